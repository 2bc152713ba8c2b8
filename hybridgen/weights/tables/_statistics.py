"""Rules of a batch normalisation with its stored statistics: torch's `BatchNorm2d` to nn/convnorm.py."""

from hybridgen.weights.rules import Rule

DROPPED = (r"(.+\.)?num_batches_tracked",)  # how often training updated them


def rules(official: str, ours: str) -> list[Rule]:
    """Scale and bias, which gradients learn, and mean and variance, which they do not."""
    return [
        Rule(f"{official}.weight", f"params/{ours}/scale"),
        Rule(f"{official}.bias", f"params/{ours}/bias"),
        Rule(f"{official}.running_mean", f"extra/{ours}/mean"),
        Rule(f"{official}.running_var", f"extra/{ours}/variance"),
    ]
