"""What a conversion makes and where it goes: one new module for a site, and the forwards that call it by a new name."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from kafops.channels import from_the_end
from kafops.rewriting import ByWidth, Traced, Untraceable
from kafops.sites import FunctionCall, Place, Targets, Use, separate, unchanged

__all__ = ["Plan", "Site", "listed", "make_plan"]

Spot = tuple[nn.Module, str]  # a module, and the name of a child of it


@dataclass(frozen=True, eq=False)
class Site:
    """One new module that is to be.

    Attributes:
        names: the qualified names it is going to have.
        spots: where it is going to be registered.
        uses: the calls that it serves.
        redirected: whether they have to be led to it, by rewriting the forwards; else it takes a module's place.
        by_width: whether it is one of several at these spots, one for each width.
    """

    names: tuple[str, ...]
    spots: tuple[Spot, ...]
    uses: list[Use]
    redirected: bool = False
    by_width: bool = False

    @property
    def old(self) -> nn.Module | FunctionCall:
        """The activation that is there now."""
        return self.uses[0].activation

    @property
    def channel_dim(self) -> int:
        """The dimension of the channels, as a layer is told it; 1 where it is not known."""
        use = self.uses[0]
        return 1 if use.channel_dim is None else from_the_end(use.channel_dim, use.rank)

    def agrees(self) -> bool:
        """Whether one module can serve all its uses."""
        return len({_kind(u) for u in self.uses}) == 1


@dataclass
class Plan:
    """The sites in order, and the new classes of modules whose forwards are rewritten."""

    sites: list[Site]
    classes: dict[nn.Module, type[nn.Module]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def install(self, new: Sequence[nn.Module]) -> Callable[[], None]:
        """Put the new modules, one for each site, into the model, and return what takes them out again."""
        children = [(parent, dict(parent._modules)) for site in self.sites for parent, _ in site.spots]
        classes = [(module, type(module)) for module in self.classes]
        widths: dict[tuple[Spot, ...], dict[int, nn.Module]] = defaultdict(dict)
        for site, module in zip(self.sites, new, strict=True):
            if site.by_width:
                widths[site.spots][site.uses[0].channels] = module
                module = ByWidth(widths[site.spots], site.channel_dim).train(module.training)
            for parent, child in site.spots:
                parent._modules[child] = module
        for module, kind in self.classes.items():
            module.__class__ = kind

        def undo() -> None:
            for parent, its in children:
                parent._modules.clear()
                parent._modules.update(its)
            for module, kind in classes:
                module.__class__ = kind

        return undo


def make_plan(
    model: nn.Module,
    places: Sequence[Place],
    targets: Targets,
    uses: Sequence[Use],
    skip: Collection[str],
    channel_dim: int | Mapping[str, int] | None,
) -> Plan:
    """Give each use a site.

    Raises:
        ValueError: an activation cannot be replaced, or a name in skip or channel_dim is none of a site.
    """
    holders: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        holders.setdefault(module, []).append(name)
    sites = [*_sites_of_modules(places, uses), *_sites_of_functions(uses, holders)]
    _check_names(skip, channel_dim, sites, {name for names in holders.values() for name in names})
    sites = [s for s in sites if not set(s.names) & set(skip)]
    sites = [replace(s, uses=[_told(u, s.names, channel_dim) for u in s.uses]) for s in sites]
    problems = [f"{s.names[0]} {u.problem}, in {u.where}" for s in sites for u in s.uses if u.problem]
    if problems:
        raise ValueError(f"these activations cannot be replaced:\n{listed(problems)}")
    splitter = _Splitter(model, places, targets, sites, uses, holders)
    sites = [part for site in sites for part in splitter.split(site)]
    return Plan(sites, splitter.classes(sites), splitter.remarks)


def _sites_of_modules(places: Sequence[Place], uses: Sequence[Use]) -> list[Site]:
    """One site for each module object, whatever its uses."""
    by_module: dict[nn.Module, list[Place]] = {}
    for place in places:
        by_module.setdefault(place.module, []).append(place)
    return [
        Site(
            tuple(name for place in its for name in place.names),
            tuple((place.parent, place.child) for place in its),
            [u for u in uses if u.place in its],
        )
        for its in by_module.values()
    ]


def _sites_of_functions(uses: Sequence[Use], holders: Mapping[nn.Module, list[str]]) -> list[Site]:
    """One site for each call of a function in a forward, a child by the function's name."""
    calls: dict[tuple[nn.Module, int], list[Use]] = {}
    for use in uses:
        if not use.place:
            calls.setdefault((use.holder, use.index), []).append(use)
    taken: dict[nn.Module, list[str]] = defaultdict(list)
    sites = []
    for (holder, _), its in calls.items():
        child = _free_name(holder, its[0].name, taken[holder])
        sites.append(Site(_names(holders[holder], child), ((holder, child),), its, redirected=True))
    return sites


def _free_name(holder: nn.Module, name: str, taken: list[str]) -> str:
    """Return the name, or with the first number from 2 on that makes it new."""
    found, n = name, 1
    while hasattr(holder, found) or found in taken:
        n += 1
        found = f"{name}_{n}"
    taken.append(found)
    return found


def _names(holder: Iterable[str], child: str) -> tuple[str, ...]:
    return tuple(f"{name}.{child}" if name else child for name in holder)


def _check_names(
    skip: Collection[str], channel_dim: int | Mapping[str, int] | None, sites: list[Site], modules: set[str]
) -> None:
    known = {name for site in sites for name in site.names}
    for argument, names, of in (
        ("skip", set(skip) - modules, "a module or site"),
        ("channel_dim", set(channel_dim) if isinstance(channel_dim, Mapping) else set(), "a site"),
    ):
        if names - known:
            raise ValueError(
                f"{argument} must name {of}, got {', '.join(sorted(names - known))}; the sites are "
                f"{', '.join(sorted(known)) or 'none'}"
            )


def _told(use: Use, names: tuple[str, ...], channel_dim: int | Mapping[str, int] | None) -> Use:
    """Return the use with the channel dimension that the caller gives."""
    if isinstance(channel_dim, Mapping):
        dims = [channel_dim[name] for name in names if name in channel_dim]
    else:
        dims = [channel_dim] if channel_dim is not None and use.channel_dim is None else []
    if not dims or not use.shape:
        return use
    try:
        return replace(use, channel_dim=from_the_end(dims[0], use.rank) % use.rank)
    except ValueError as e:
        raise ValueError(f"channel_dim of {names[0]}: {e}, shape {list(use.shape)}") from None


def _kind(use: Use) -> tuple[object, ...]:
    return use.channels, use.rank, use.channel_dim, use.device


class _Splitter:
    """Divides a site whose uses differ: by place, by call, or where calls cannot be told apart by width."""

    def __init__(
        self,
        model: nn.Module,
        places: Sequence[Place],
        targets: Targets,
        sites: Sequence[Site],
        uses: Sequence[Use],
        holders: Mapping[nn.Module, list[str]],
    ) -> None:
        self.remarks: list[str] = []
        self._places = {(p.parent, p.child): p for p in places}
        self._holders = holders
        self._taken: dict[nn.Module, list[str]] = defaultdict(list)
        for site in sites:
            for parent, child in site.spots if site.redirected else ():
                self._taken[parent].append(child)
        needed = dict.fromkeys(u.holder for s in sites if s.redirected or not s.agrees() for u in s.uses)
        self._traces: dict[nn.Module, Traced | Untraceable] = {}
        if needed:
            with unchanged(model):
                owners = separate(places)
                for holder in needed:
                    seen = {u.index: u for u in reversed(uses) if u.holder is holder}
                    self._traces[holder] = _traced(holder, owners, targets, [seen[i] for i in sorted(seen)])

    def split(self, site: Site) -> list[Site]:
        if site.redirected:
            self._check_traces(site)
        if site.agrees():
            return [site]
        if len(site.spots) == 1:
            return self._by_call(site)
        places = [self._places[spot] for spot in site.spots]
        parts = [
            Site(p.names, (spot,), [u for u in site.uses if u.place is p])
            for p, spot in zip(places, site.spots, strict=True)
        ]
        unused = [name for part in parts if not part.uses for name in part.names]
        if unused:
            raise ValueError(f"{_differ(site)}\nand not at all as {', '.join(unused)}")
        return [piece for part in parts for piece in self.split(part)]

    def _by_call(self, site: Site) -> list[Site]:
        calls: dict[tuple[nn.Module, int], list[Use]] = {}
        for use in site.uses:
            calls.setdefault((use.holder, use.index), []).append(use)
        parts = [replace(site, uses=its) for its in calls.values()]
        untraced = {str(t) for t in (self._traces[holder] for holder, _ in calls) if isinstance(t, Untraceable)}
        if site.redirected or untraced or not all(p.agrees() for p in parts):
            return self._by_width(site, "; ".join(untraced) or "one forward is called with several widths")
        parent, child = site.spots[0]
        for i, part in enumerate(parts[1:], 1):
            holder = part.uses[0].holder
            base = child if holder is parent and not child.isdigit() else type(site.old).__name__.lower()
            name = _free_name(holder, base, self._taken[holder])
            names = _names(self._holders[holder], name)
            parts[i] = Site(names, ((holder, name),), part.uses, redirected=True)
        return parts

    def _by_width(self, site: Site, reason: str) -> list[Site]:
        widths: dict[int, list[Use]] = {}
        for use in site.uses:
            widths.setdefault(use.channels, []).append(use)
        parts = [
            replace(site, names=_names(site.names, str(width)), uses=of, by_width=True) for width, of in widths.items()
        ]
        if len({p.channel_dim for p in parts}) > 1 or not all(p.agrees() for p in parts):
            raise ValueError(f"{_differ(site)}\nand they cannot be told apart: {reason}")
        self.remarks.append(
            f"{site.names[0]}: a curve for each width, not for each call, for these cannot be told apart: {reason}"
        )
        return parts

    def _check_traces(self, site: Site) -> None:
        for use in site.uses:
            trace = self._traces[use.holder]
            if isinstance(trace, Untraceable):
                raise ValueError(
                    f"{site.old} in {use.where} is the call of a function, and the forward that has it cannot be "
                    f"rewritten: {trace}\nmake it an nn.Module attribute (self.act = nn.ReLU()) and call that, leave "
                    f"it alone by skip={site.names[0]!r}, or narrow targets"
                )

    def classes(self, sites: Sequence[Site]) -> dict[nn.Module, type[nn.Module]]:
        """Return the classes with the forwards that lead each redirected use to its site."""
        moves: dict[nn.Module, dict[int, str]] = defaultdict(dict)
        for site in sites:
            for use in site.uses if site.redirected else ():
                moves[use.holder][use.index] = site.spots[0][1]
        traces: dict[nn.Module, Traced] = {holder: self._traces[holder] for holder in moves}  # type: ignore[misc]
        for name, frozen in sorted({(type(h).__name__, ", ".join(sorted(t.frozen))) for h, t in traces.items()}):
            if frozen:
                self.remarks.append(f"{name}: its new forward has taken over {frozen}; a later change has no effect")
        return {holder: trace.subclass(moves[holder]) for holder, trace in traces.items()}


def _traced(
    holder: nn.Module, owners: Mapping[nn.Module, Place], targets: Targets, uses: Sequence[Use]
) -> Traced | Untraceable:
    try:
        traced = Traced(holder, owners, targets)
    except Untraceable as e:
        return e
    seen = [u.place or u.name for u in uses]
    if seen != traced.activations:
        return Untraceable("what it calls depends on its input")
    return traced


def _differ(site: Site) -> str:
    calls = [f"shape {list(u.shape)}, channels in {u.channel_dim}, on {u.device}, in {u.where}" for u in site.uses]
    return f"one {site.old} ({', '.join(site.names)}) is used at sites that differ:\n{listed(calls)}"


def listed(lines: Iterable[str], limit: int = 10) -> str:
    """Return the lines indented, each once, and not too many."""
    unique = list(dict.fromkeys(lines))
    more = [f"  and {len(unique) - limit} more"] if len(unique) > limit else []
    return "\n".join([f"  {line}" for line in unique[:limit]] + more)
