"""What a rank owns of each parameter: the unit that checkpoints are made of."""

from dataclasses import dataclass

from torch import Size, Tensor


@dataclass(frozen=True)
class Fragment:
    """A contiguous run of one parameter's elements with its optimizer state; tensors are views of live memory.

    name: state-dict name. shape: of the whole parameter. start: first element, in the flattened parameter.
    owned: False where another rank saves the same elements. weight, exp_avg, exp_avg_sq, ema: [n] float32.
    """

    name: str
    shape: Size
    start: int
    owned: bool
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    ema: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The four tensors by the name under which checkpoints keep them."""
        return {"weight": self.weight, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "ema": self.ema}
