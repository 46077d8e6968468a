"""Keep the features of samples that are drawn for their scores alone, so that a killed command goes on."""

import json
import shutil
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from var_jax.evaluation.extractors import FeatureSet
from var_jax.evaluation.inception import Features
from var_jax.sampling.sample_writer import atomic_write, check_same_job, explain_write_errors

NUM_SHOWN = 10  # images that are kept, for a picture


class FeatureChunks:
    """Features of consecutive chunks of samples, a file each; in a folder that is removed at the end.

    Attributes:
      chunk: number of samples in a chunk: that of the call that began.
    """

    def __init__(self, folder: Path, job: dict, count: int, chunk: int):
        """Open what an earlier call left, or begin.

        Args:
          folder: of the files.
          job: values that decide the samples and features, as JSON; must be the same to resume.
          count: number of samples of the job.
          chunk: number of samples in a chunk.

        Raises:
          OtherSamples: if the folder is of another job, naming the differences.
        """
        self._folder, self._count = folder, count
        self._shown = set(np.linspace(0, count - 1, min(count, NUM_SHOWN)).astype(int).tolist())
        path = folder / "job.json"
        with explain_write_errors(folder.parent):
            folder.mkdir(parents=True, exist_ok=True)
            if path.exists():
                saved = json.loads(path.read_text())
                chunk = saved.pop("chunk")
                check_same_job(saved, json.loads(json.dumps(job)), folder)
            else:
                with atomic_write(path) as file:
                    file.write(json.dumps(job | {"chunk": chunk}).encode())
        self.chunk = chunk

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:06d}.npz"

    def done(self) -> int:
        """Return the number of samples in complete chunks."""
        index = 0
        while self._path(index).exists():
            index += 1
        return min(index * self.chunk, self._count)

    def append(self, images: UInt8[np.ndarray, "n h w 3"], features: Features) -> None:
        """Write the next chunk.

        Raises:
          SamplesNotWritten: if the disk is full.
        """
        start = self.done()
        shown = [i for i in range(len(images)) if start + i in self._shown]
        arrays = {name: x for name, x in vars(features).items() if x is not None}
        with explain_write_errors(self._folder), atomic_write(self._path(start // self.chunk)) as file:
            np.savez(file, shown=images[shown], shown_vectors=features.pool[shown], **arrays)

    def load(self) -> tuple[FeatureSet, UInt8[np.ndarray, "m h w 3"], np.ndarray]:
        """Return the features of all samples, and some of the images with their vectors."""
        features, images, vectors = FeatureSet(), [], []
        for index in range(-(-self._count // self.chunk)):
            with np.load(self._path(index)) as file:
                features.add(Features(file["pool"], file.get("spatial"), file["log_probs"]))
                images.append(file["shown"])
                vectors.append(file["shown_vectors"])
        return features, np.concatenate(images), np.concatenate(vectors)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder)
