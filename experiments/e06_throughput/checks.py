"""Whether CATS generates the tokens that it must (float32, greedy)."""

from torch import Tensor

from experiments.e06_throughput.bench import Bench
from experiments.e06_throughput.decoding import Decoder
from experiments.framework.tables import GreedyRow, Row


def greedy_checks(bench: Bench, tokens: int) -> list[Row]:
    """CATS at sparsity 0 against dense, and the sparse kernel against the dense masked path at the first target."""
    bench.prepare("eager")
    sparsity = bench.options.sparsities[0]
    ids = bench.prompts[:1, : bench.options.prompt_tokens]
    decoder = Decoder(bench.model, "eager", ids.shape[1] + tokens)

    def generated(target: float | None, kernel: str | None = None) -> Tensor:
        bench.switch(target, kernel)
        return decoder.generate(ids, tokens).tokens[0, ids.shape[1] :]

    pairs = {
        "cats-0 against dense": (generated(0.0), generated(None)),
        f"cats-{100 * sparsity:g} against masked reference": (
            generated(sparsity),
            generated(sparsity, "reference"),
        ),
    }
    bench.switch(None)
    return [
        GreedyRow(**bench.common, check=check, tokens=tokens, identical_tokens=common_prefix(ours, other))
        for check, (ours, other) in pairs.items()
    ]


def common_prefix(a: Tensor, b: Tensor) -> int:
    """Number of leading elements in which two vectors of one length agree."""
    return int((a == b).long().cumprod(0).sum())
