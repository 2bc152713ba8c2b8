"""Rules of batch normalisation with stored statistics: PyTorch's `BatchNorm2d` to nn/convnorm.py."""

from hybridgen.weights.rules import Rule

DROPPED = (r"(.+\.)?num_batches_tracked",)  # how often training updated them


def rules(official: str, ours: str) -> list[Rule]:
    """Rules of scale and bias, which are trained, and of mean and variance, which are stored statistics."""
    return [
        Rule(f"{official}.weight", f"params/{ours}/scale"),
        Rule(f"{official}.bias", f"params/{ours}/bias"),
        Rule(f"{official}.running_mean", f"extra/{ours}/mean"),
        Rule(f"{official}.running_var", f"extra/{ours}/variance"),
    ]
