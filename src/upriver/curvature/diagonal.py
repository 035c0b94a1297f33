"""The diagonal of the Fisher in the weights' own basis: the curvature ``diagonal``, measured when it is first asked for."""

from pathlib import Path

from upriver.curvature.consumers import Correction, begun, pool_means
from upriver.curvature.factors import Factors, write_lam
from upriver.curvature.fit import prepared, summed
from upriver.model.model import Model
from upriver.model.planned import division_file
from upriver.runtime import dist
from upriver.runtime.artifact import Artifact, discard, locked
from upriver.runtime.cost import DIAGONAL
from upriver.runtime.device import float32_products
from upriver.runtime.progress import Progress, mute, silent
from upriver.text.batch import Sequences


def fit_diagonal(
    model: Model, data: Sequences, factors: Factors, memory: str | None = None, progress: Progress = silent
) -> None:
    """Measure the diagonal on the sample that the factors were fitted on, into their folder."""
    factors.check(model, data)
    folder = factors.path / "diagonal"
    if not (folder / "lam.safetensors").exists():
        # the tokens that ``until`` came to
        told = {"memory": memory, "until": None, "max_tokens": factors.manifest["fit"]["tokens"]}
        opts = factors.options.model_copy(update=told)
        with locked(factors.path), float32_products(opts.tf32), model.computing_in(str(opts.dtype)) as computing:
            factors.check_unchanged()
            work = prepared(Artifact(factors.path, factors.manifest["key"]), computing, data, opts, progress, mute)
            files: dict[str, Path] = {}
            for group in work.groups("correction"):  # which hold at least as much
                sums = summed(
                    work,
                    DIAGONAL,
                    group,
                    lambda sums, of=group: Correction(begun(sums, of, work.model), work.dtype, None),
                )
                files |= dict.fromkeys((x.name for x in group), sums)
            means = pool_means(work.layers, files)
            dist.on_first(lambda: write_lam(folder / "lam.safetensors", files, means))
    if dist.rank() == 0:
        for sums in folder.glob("layers-*"):
            discard(sums)
        division_file(factors.path).unlink(missing_ok=True)
    dist.barrier()
