"""How many of the networks that people have does replace_activations() convert? python -m bench.convert > table.md

All classifiers of torchvision and a hundred of timm's, the first names of each family in turn. Networks of up to
`--values` million parameters are run on values, and with base="same" their outputs must not move by more than rounding;
others on the meta device, which tells sites and channels. Those that take images of another size are converted for
these, too: the widths must be the same, or some were numbers of tokens or rows.
"""

import argparse
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
from torch import nn

import kafops
from kafops.bases import BASES


@dataclass
class Result:
    """What came of one network."""

    name: str
    curves: int = 0
    unfused: int = 0
    moved: float | None = None  # the outputs, by that share of the largest
    same_at_other_size: bool | None = None  # the widths
    refusal: str = ""


def torchvision_names() -> list[str]:
    """Return the classifiers."""
    return torchvision.models.list_models(module=torchvision.models)


def timm_names(count: int) -> list[str]:
    """Return the first names of each family, then the second, until there are enough."""
    families = [timm.list_models(module=module) for module in timm.list_modules()]
    rounds = max(map(len, families))
    names = [family[i] for i in range(rounds) for family in families if i < len(family)]
    return list(dict.fromkeys(names))[:count]


def torchvision_model(name: str, larger: int = 0) -> tuple[nn.Module, int]:
    """Return a classifier and the size of its images."""
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    size = (299 if name == "inception_v3" else 224) + larger
    if name.startswith("vit_"):
        options["image_size"] = size
    elif name == "maxvit_t":
        options["input_size"] = (size, size)
    return torchvision.models.get_model(name, weights=None, **options), size


def timm_model(name: str, larger: int = 0) -> tuple[nn.Module, int]:
    """Return a classifier and the size of its images."""
    model: Any = timm.create_model(name)
    size = model.pretrained_cfg["input_size"][1]
    if larger:
        try:
            model = timm.create_model(name, img_size=size + larger)
        except TypeError:  # a network for any size
            model = timm.create_model(name)
    return model, size + larger


def tried(name: str, build: Callable[..., tuple[nn.Module, int]], values: float) -> Result:
    """Convert one network."""
    torch.manual_seed(0)
    try:
        with torch.device("meta"):
            model, size = build(name)
        device = "meta"
    except Exception:  # values are needed to build it
        model, size = build(name)
        device = "cpu"
    if device == "meta" and sum(p.numel() for p in model.parameters()) <= values * 1e6:
        model, size = build(name)
        device = "cpu"
    try:
        example = torch.randn(2, 3, size, size, device=device)
        report = kafops.replace_activations(model, kafops.KAF, example_input=example, base="same")
    except Exception as e:
        return Result(name, refusal=f"{type(e).__name__}: {e}")
    unfused = sum(r.new.base not in BASES for r in report)
    moved = report.moved.by / (report.moved.of or 1) if report.moved else None
    return Result(name, len(report), unfused, moved, same_at_other_size(name, build, report))


def same_at_other_size(
    name: str, build: Callable[..., tuple[nn.Module, int]], report: kafops.ReplacementReport
) -> bool | None:
    """Whether larger images give the same widths; None where the network does not take them."""
    try:
        with torch.device("meta"):
            model, size = build(name, larger=64)
            model(torch.empty(2, 3, size, size))
    except Exception:
        return None
    other = kafops.replace_activations(model, kafops.KAF, example_input=torch.empty(2, 3, size, size, device="meta"))
    return [(r.names, r.channels) for r in other] == [(r.names, r.channels) for r in report]


def lines(title: str, results: list[Result]) -> Iterator[str]:
    """Yield a paragraph on the results, with the refusals by name."""
    done = [r for r in results if not r.refusal]
    values = [r.moved for r in done if r.moved is not None]
    yield f"**{title}**: {len(done)} of {len(results)} convert ({100 * len(done) / len(results):.0f} %), with"
    yield f"{sum(r.curves for r in done)} curves, {sum(r.unfused for r in done)} of them on an activation that is kept."
    yield f"Of {len(values)} run on values, the outputs moved by {max(values, default=0):.1e} of the largest at most."
    sizes = [r.same_at_other_size for r in done if r.same_at_other_size is not None]
    yield f"Of {len(sizes)} converted for larger images too, {sum(sizes)} have the same widths."
    yield ""
    for reason, count in Counter(r.refusal.partition("\n")[0] for r in results if r.refusal).items():
        names = ", ".join(f"`{r.name}`" for r in results if r.refusal.partition("\n")[0] == reason)
        yield f"- {names}: {reason}" if count == 1 else f"- {count}, {names}: {reason}"
    yield ""


def main() -> None:
    """Try all, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--values", type=float, default=12.0, help="millions of parameters up to which values are run")
    parser.add_argument("--timm", type=int, default=100, help="how many of timm's names")
    parser.add_argument("--only", default="", help="names that contain this")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for title, names, build in (
        (f"torchvision {torchvision.__version__}", torchvision_names(), torchvision_model),
        (f"timm {timm.__version__}", timm_names(args.timm), timm_model),
    ):
        results = []
        for name in names:
            if args.only in name:
                results.append(tried(name, build, args.values))
                print(f"<!-- {results[-1]} -->", flush=True)
        if results:
            print("\n".join(lines(title, results)), flush=True)


if __name__ == "__main__":
    main()
