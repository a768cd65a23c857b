"""What Model Tailor asks of a model: the base's weights, and the inputs that each layer sees on some records."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..adapters.load import load as load_adapter
from ..adapters.plain import Adapter
from ..data.batches import read_through
from ..data.records import read as read_records
from ..evaluation.prompts import check_prompts
from ..models.load import check_mergeable, computing, load, see_as
from .tailor import moments_of


def calibrate(
    adapter: Adapter,
    base: str | Path,
    data: str | Path,
    limit: int = 128,
    *,
    images: str | Path | None = None,
    trust_remote_code: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run the tuned model over the first ``limit`` records of a file, one by one, in fp32.

    Args:
        adapter: as :func:`~lorasculpt.posthoc.read` returns it.
        base: the model it was trained on, a folder or a name on the Hub.
        data: a file of records; of the task that was learned, in the authors' code.
        limit: how many records at most.
        images: the folder of their pictures. Default: that of ``data``.
        trust_remote_code: run the code that comes with the base.

    Returns:
        Of each layer of the adapter by its name: the base's weight, (out, in), and the second moment of the tuned
        model's inputs, (in, in); both on the CPU.

    Raises:
        UserError: the records or the base cannot be read, or the adapter is not the base's.
    """
    records = read_records(data, images=images, limit=limit)
    model, processor = load(str(base), device=computing(), trust_remote_code=trust_remote_code)
    check_mergeable(model, base)
    see_as(processor, adapter.folder)
    check_prompts(processor, records)
    tuned = load_adapter(model, adapter.folder).eval()
    names = [pair.name for pair in adapter.pairs]
    moments = moments_of(tuned, names, read_through(model, processor, records))
    inner = tuned.get_base_model()
    weights = {name: inner.get_submodule(name).get_base_layer().weight.detach().cpu() for name in names}
    return weights, moments
