"""What a run's folder says about itself: recipe, versions, commit, data, losses as a picture, a model card."""

import json
from pathlib import Path
from typing import Any


def plot_losses(metrics: list[dict[str, float]], file: Path) -> None:
    """Each loss over the steps, thin as it was and thick as a running mean; no file before the first step."""
    from matplotlib.figure import Figure

    names = sorted({name for line in metrics for name in line if name != "step"})
    if not names:
        return
    figure = Figure(figsize=(5 * len(names), 3.2))
    axes = figure.subplots(1, len(names), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        steps = [line["step"] for line in metrics if name in line]
        values = [line[name] for line in metrics if name in line]
        axis.plot(steps, values, linewidth=0.5, alpha=0.4)
        axis.plot(steps, running_mean(values), linewidth=1.5)
        axis.set_title(name)
        axis.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(file, dpi=80)


def running_mean(values: list[float], rate: float = 0.05) -> list[float]:
    """Exponential, begun at the first value."""
    means: list[float] = []
    for value in values:
        means.append(value if not means else means[-1] + rate * (value - means[-1]))
    return means


def card(description: dict[str, Any], metrics: list[dict[str, float]]) -> str:
    """The run's model card, Markdown."""
    last = metrics[-max(1, len(metrics) // 10) :]
    names = sorted({name for line in last for name in line if name != "step"})
    means = {name: [line[name] for line in last if name in line] for name in names}
    losses = "\n".join(f"| {name} | {sum(values) / len(values):.4f} |" for name, values in means.items())
    data = description["data"]
    known = f", fingerprint `{data['fingerprint']}`" if data["fingerprint"] else ""
    command, commit = f"`python -m trainer {description['stage']}`", description["commit"] or "unknown"
    return f"""# A voken mapper: {description["stage"]}

Made by {command} of MiniGPT-5 for ComfyUI and diffusers, commit `{commit}`.

- Data: {data["name"]}{known}. Its licence is that of this model.
- Steps: {metrics[-1]["step"] if metrics else 0}, seed {description["recipe"]["run"]["seed"]}.

| loss, mean of the last tenth of the steps | |
| --- | --- |
{losses}

![Losses](losses.png)

How good it is `python -m trainer evaluate` says. The recipe:

```json
{json.dumps(description["recipe"], indent=1)}
```
"""
