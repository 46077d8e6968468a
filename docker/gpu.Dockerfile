# JAX on NVIDIA GPUs, with CUDA 13 and cuDNN: the host needs a driver, 580 or newer, and the NVIDIA Container Toolkit.
#
#   docker build -f docker/gpu.Dockerfile -t var_jax:gpu .
#   docker run --rm --gpus=all var_jax:gpu                         # the doctor
#   docker run --rm --gpus=all -v var_jax_cache:/cache -v var_jax_data:/data -v var_jax_runs:/runs \
#       var_jax:gpu train.py --config=configs/digits.py --workdir=/runs/digits --config.data.dir=/data
#
# The arguments are those of Python, in the folder of the repository.
FROM python:3.12-slim-bookworm

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
RUN useradd --create-home --uid=1000 var_jax \
 && install --directory --owner=var_jax --group=var_jax /cache /data /runs

# Packages before sources: a change of the sources builds the last two layers only.
WORKDIR /var_jax
COPY requirements/demo.txt requirements/
RUN pip install --require-hashes -r requirements/demo.txt
ARG JAX_VERSION=0.11.2
RUN pip install "jax[cuda13]==${JAX_VERSION}"
COPY . .
RUN pip install --no-build-isolation --no-deps -e .

ENV JAX_COMPILATION_CACHE_DIR=/cache/xla
VOLUME ["/cache", "/data", "/runs"]
USER 1000
ENTRYPOINT ["python"]
CMD ["-m", "var_jax.tools.doctor", "--workdir=/runs", "--data_dir=/data"]
