"""What was found out of a model: which rule gives which parameter's gradients, and where the examples are in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn

from byline.features.layers import ALTERNATIVES, Rule, is_plain, rule_for
from byline.features.layouts import Layout
from byline.features.tracing import Site, functional_site


@dataclass(frozen=True)
class Verdict:
    """What was found out of a model's structure on a few examples."""

    fallback: frozenset[str] = frozenset()
    """Parameters that no rule covers: per-example autograd, in every batch."""
    layouts: Mapping[str, tuple[Layout, ...]] = field(default_factory=dict)
    """By site, where the examples are in each of its calls; one for all calls where they agree."""
    rules: Mapping[str, str] = field(default_factory=dict)
    """By site, another rule than its class's (`layers.ALTERNATIVES`)."""
    functional: Mapping[str, tuple[Rule, str | None]] = field(default_factory=dict)
    """Weights that are used without their module, the rule of that use, and the bias that goes with it."""
    spread: frozenset[str] = frozenset()
    """Sites whose output does not depend on the batch."""
    forms: Mapping[str, int] = field(default_factory=dict)
    """Parameters that broadcasting gives to every example (`tracing.repeated`)."""
    vectorised: bool = True
    """Whether per-example autograd gives the same under vmap as one example at a time."""
    coarse: bool = False
    """Whether layers compute in half precision, as they do under autocast whatever their weights are."""
    proven: set[int] = field(default_factory=set, compare=False)
    """Hashes of the graphs and shapes whose rows were seen to belong to one example each (`graphs`)."""
    apart: dict[int, bool] = field(default_factory=dict, compare=False)
    """By wiring, whether its shapes show that no operation brings examples together (`graphs.keeps_apart`)."""


def agreed(one: Verdict, other: Verdict) -> Verdict:
    """What two verdicts on one model have in common: of its output and of its loss, so that their rows have one form.

    Where they differ, per-example autograd does it for both.
    """
    differ = {
        name
        for a, b in ((one.forms, other.forms), (one.functional, other.functional))
        for name in {*a, *b}
        if a.get(name) != b.get(name)
    }
    return Verdict(
        one.fallback | other.fallback | frozenset(differ),
        {**other.layouts, **one.layouts},
        {**other.rules, **one.rules},
        {name: use for name, use in one.functional.items() if name not in differ},
        one.spread | other.spread,
        {name: form for name, form in one.forms.items() if name not in differ},
        one.vectorised and other.vectorised,
        one.coarse or other.coarse,
    )


class Sites:
    """Where a model uses its attributed parameters by rules.

    Args:
        model: the member's model.
        params: the attributed parameters by name.
        rules: by site, another rule than its class's.
        functional: weights that are used without their module, too.
        without: parameters to leave out.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, nn.Parameter],
        rules: Mapping[str, str],
        functional: Mapping[str, tuple[Rule, str | None]],
        without: Collection[str] = (),
    ):
        names = {id(parameter): name for name, parameter in params.items()}
        self.uses: dict[str, int] = {}
        held: list[tuple[str, nn.Module, dict[str, str]]] = []
        for key, module in model.named_modules():
            slots = {a: names[id(p)] for a, p in module._parameters.items() if p is not None and id(p) in names}
            for name in slots.values():
                self.uses[name] = self.uses.get(name, 0) + 1
            if slots:
                held.append((key, module, slots))
        for name, (_, bias) in functional.items():
            for one in {name, bias} - {None}:
                self.uses[str(one)] = self.uses.get(str(one), 0) + 1
        self.sites: dict[str, Site] = {}
        ruled: set[str] = set()
        unruled: set[str] = set()
        for key, module, slots in held:
            rule = ALTERNATIVES[rules[key]] if key in rules else rule_for(module)
            (unruled if rule is None else ruled).update(slots.values())
            own = {a: name for a, name in slots.items() if name not in without}
            if rule is not None and own:
                joined = all(self.uses[name] == 1 for name in own.values())
                self.sites[key] = Site(key, own, rule, module, joined)
        for name, (rule, bias) in functional.items():
            slots = {"weight": name} if bias is None else {"weight": name, "bias": bias}
            ruled |= set(slots.values())
            unruled -= set(slots.values())
            if name not in without:
                site = functional_site({a: n for a, n in slots.items() if n not in without}, rule)
                self.sites[site.key] = site
        self.uncovered = (set(params) - ruled) | unruled
        """Parameters that some module holds, or nothing that is known, and for which there is no rule."""
        self.plain = {
            key for key, site in self.sites.items() if site.module is None or is_plain(site.module, site.rule)
        }

    def watched(self) -> set[str]:
        """Parameters with a use whose rule is no theorem."""
        return {n for key, site in self.sites.items() if key not in self.plain for n in site.slots.values()}

    def modules(self) -> list[Site]:
        """Those to hook."""
        return [site for site in self.sites.values() if site.module is not None]
