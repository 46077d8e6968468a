"""Descriptions of GPUs for XLA's ahead-of-time compiler.

Sources: NVIDIA's data sheets and CUDA's table of compute capabilities; memory is what the driver reports.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuSpec:
    """Properties of a GPU that the compiler's choices depend on.

    Attributes:
      name: JAX's `device_kind`.
      compute_capability: CUDA's, major and minor.
      features: feature extension of the compute capability: ACCELERATED_FEATURES for sm_90a, "" for none.
      cores: streaming multiprocessors.
      fpus: float32 units of a core.
      clock_ghz: boost clock.
      memory: bytes.
      bandwidth: memory bandwidth in bytes/s.
      l2_cache: bytes.
      shared_memory: bytes of a core; a block can use 1024 less.
    """

    name: str
    compute_capability: tuple[int, int]
    features: str
    cores: int
    fpus: int
    clock_ghz: float
    memory: int
    bandwidth: int
    l2_cache: int
    shared_memory: int

    @property
    def target_config(self) -> str:
        """Return XLA's GpuTargetConfigProto in text format."""
        major, minor = self.compute_capability
        features = f"feature_extension: {self.features}" if self.features else ""
        return f"""
            gpu_device_info {{
              name: "{self.name}"
              cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
              core_count: {self.cores}
              fpus_per_core: {self.fpus}
              clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory}
              memory_bandwidth: {self.bandwidth}
              l2_cache_size: {self.l2_cache}
              shared_memory_per_core: {self.shared_memory}
              shared_memory_per_block_optin: {self.shared_memory - 1024}
              shared_memory_per_block: 49152
              threads_per_block_limit: 1024
              threads_per_warp: 32
              threads_per_core_limit: 2048
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              driver_version: "13.0.0"
              runtime_version: "12.8.0"
              compile_time_toolkit_version: "12.8.0"
              dnn_version: "9.10.0"
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            device_description_str: "{self.name}"
        """


GPUS = {
    "h100": GpuSpec(
        name="NVIDIA H100 80GB HBM3",
        compute_capability=(9, 0),
        features="ACCELERATED_FEATURES",
        cores=132,
        fpus=128,
        clock_ghz=1.98,
        memory=84942979072,
        bandwidth=3352320000000,
        l2_cache=50 * 2**20,
        shared_memory=228 * 2**10,
    ),
    "h200": GpuSpec(
        name="NVIDIA H200",
        compute_capability=(9, 0),
        features="ACCELERATED_FEATURES",
        cores=132,
        fpus=128,
        clock_ghz=1.98,
        memory=151397597184,
        bandwidth=4800000000000,
        l2_cache=50 * 2**20,
        shared_memory=228 * 2**10,
    ),
    "a100": GpuSpec(
        name="NVIDIA A100-SXM4-40GB",
        compute_capability=(8, 0),
        features="",
        cores=108,
        fpus=64,
        clock_ghz=1.41,
        memory=42505273344,
        bandwidth=1555200000000,
        l2_cache=40 * 2**20,
        shared_memory=164 * 2**10,
    ),
}
