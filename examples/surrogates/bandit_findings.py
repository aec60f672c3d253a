"""What the bandit says: sentences and tables that its CSV file fills and, where a conclusion may turn, chooses."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from bandit import BETA
from grid import EPOCHS, NAMES
from table import Estimate, Row, at_rollout, chosen, difference, listed, markdown, of, span, values

NEAR, REACHED = 0.05, 0.99
"""Shares of the gap to J*: what counts as alike, and as the optimum."""
WITH_AND_WITHOUT = {f"β = {BETA:g}": BETA, "β = 0": 0.0}


def grid(rows: Sequence[Row]) -> list[str]:
    """Reward at KL of the grid, under sampling noise."""
    own, body, gaps, errors = chosen(rows, experiment="grid"), [], {BETA: [], 0.0: []}, []
    for name in NAMES:
        body.append([name])
        for beta, epochs in product(gaps, EPOCHS):
            run = {"surrogate": name, "beta": beta, "epochs": epochs}
            reward, kl, gap = (of(own, column, **run) for column in ("reward", "kl", "gap_closed"))
            body[-1].append(f"{reward.mean:.2f} at {kl.mean:.2f}: {gap.mean:.2f}")
            gaps[beta].append(gap.mean)
            errors.append(gap.error)
    if min(gaps[BETA]) > max(gaps[0.0]):
        text = f"Whatever the surrogate, {span(gaps[BETA])} of the gap is closed with the KL to SFT, {span(gaps[0.0])} "
        text += "without."
    else:
        text = "The choice of surrogate weighs more than the KL to SFT."
    text += f" Cells: reward at KL to SFT: gap closed (standard errors of the gap {span(errors)})."
    head = ["", *(f"β = {beta:g}, {epochs} inner" for beta, epochs in product(gaps, EPOCHS))]
    return [text, markdown(head, body)]


def duplicate(rows: Sequence[Row]) -> list[str]:
    """Does KLPEN repeat the KL to SFT? Its fixed point with and without, per b, without noise."""
    exact = chosen(rows, experiment="fixed point")
    prices, body, reached, missed, apart = values(exact, "b"), [], [], [], []
    for b in prices:
        both = [{"b": b, "beta": beta} for beta in WITH_AND_WITHOUT.values()]
        gaps = [of(exact, "gap_closed", **one) for one in both]
        body.append([f"{b:g}", *(x.text() for x in gaps), *(of(exact, "kl", **one).text() for one in both)])
        (reached if gaps[0].mean >= REACHED else missed).append(b)
        less = difference(exact, "gap_closed", both[1], both[0])
        apart.append(less.sure and less.mean < 0)
    alone = {column: span([of(exact, column, b=b, beta=0.0).mean for b in prices]) for column in ("kl", "gap_closed")}
    text = [
        "**No.**" if all(apart) else "**Not decided by these figures.**",
        f"KLPEN beside the KL to SFT reaches the optimum (gap closed ≥ {REACHED}) at b = {listed(reached)}"
        + (f" and misses it at b = {listed(missed)}{_theory(missed, reached)}." if missed else "."),
        f"KLPEN alone ends at {alone['kl']} nats from SFT, where the optimum has "
        f"{of(exact, 'kl_best', beta=BETA).mean:.2f}, with {alone['gap_closed']} of the gap closed.",
        *_vanishing(exact, reached),
        *_early(exact, prices),
    ]
    head = ["b", *(f"{what}, {kind}" for what in ("gap closed", "nats from SFT") for kind in WITH_AND_WITHOUT)]
    return [" ".join(text), markdown(head, body)]


def _theory(missed: Sequence[float], reached: Sequence[float]) -> str:
    """The theory's bound, and whether the runs agree with it."""
    agrees = max(missed) < BETA / 2 < min(reached, default=0.0)
    return f" (theory asks for b > β/2 = {BETA / 2:g})" if agrees else " (which b > β/2 does not explain)"


def _vanishing(exact: Sequence[Row], reached: Sequence[float]) -> list[str]:
    """What KLPEN charges, and what the KL to SFT charges, at the first rollout and at the last."""
    if not reached:
        return []
    own = chosen(exact, b=max(reached), beta=BETA)
    old, sft = ([at_rollout(own, name, step) for step in (1, values(own, "rollout")[-1])] for name in ("kl_old", "kl"))
    verdict = "vanishes" if old[1] < 0.01 * sft[1] else "does not vanish"
    return [
        f"The KL it charges, to the old policy, {verdict} (b = {max(reached):g}: {old[0]:.3f} nats at the first "
        f"rollout, {old[1]:.0e} at the last); that to SFT goes from {sft[0]:.2f} to {sft[1]:.2f}."
    ]


def _early(exact: Sequence[Row], prices: Sequence[float]) -> list[str]:
    """Negative: stopped at the right moment, KLPEN alone looks like a KL to SFT."""
    found = []
    for b in prices:
        own = chosen(exact, b=b, beta=0.0)
        means = {at_rollout(own, "gap_closed", step): step for step in values(own, "rollout")}
        found.append((max(means), means[max(means)], list(means)[-1], b))
    peak, when, end, b = max(found)
    if peak - end < NEAR:
        return []
    return [
        f"Against this: at b = {b:g} KLPEN alone has closed {peak:.2f} of the gap after {when:.0f} rollouts, before it "
        f"falls to {end:.2f}. Stopped early, it passes for a KL to SFT."
    ]


def trust(rows: Sequence[Row]) -> list[str]:
    """When does a trust region matter? Where the plain ratio loses to all that have one."""
    own, lost, alike = chosen(rows, experiment="trust"), [], []
    epochs, rates = values(own, "epochs"), values(own, "lr")
    for count, rate in product(epochs, rates):
        plain = {"surrogate": "unclipped", "epochs": count, "lr": rate}
        less = [difference(own, "gap_closed", plain, plain | {"surrogate": name}) for name in NAMES[:-1]]
        moved = of(own, "kl_old", **plain).mean
        if all(x.sure and x.mean < -NEAR for x in less):
            lost.append((f"{count:g}×{rate:g} (by at least {-max(x.mean for x in less):.2f})", moved))
        if all(abs(x.mean) < NEAR for x in less):
            alike.append(moved)
    text = [_where(lost, alike, len(epochs) * len(rates)), *_price_of_epochs(own), *_speed(rows)]
    shown = [(count, rate) for count in epochs for rate in (rates[0], *rates[-2:])]
    body = [[n, *(of(own, "gap_closed", surrogate=n, epochs=c, lr=r).text() for c, r in shown)] for n in NAMES]
    return [" ".join(text), markdown(["inner epochs × lr", *(f"{c:g}×{r:g}" for c, r in shown)], body)]


def _where(lost: Sequence[tuple[str, float]], alike: Sequence[float], count: int) -> str:
    """The settings, and what they have in common."""
    if not lost:
        return f"In none of {count} settings does the plain ratio lose clearly to all three that bound it."
    text = f"**Where the steps of a rollout add up.** Of {count} settings (inner epochs × learning rate) the plain "
    text += f"ratio loses to CLIP and both KLPENs at {', '.join(name for name, _ in lost)}"
    text += f"; in {len(alike)} the four end within {NEAR} of each other."
    if alike and max(alike) < min(kl for _, kl in lost):
        text += " What tells these apart is how far one rollout still moves the plain ratio at the end: KL(old‖new) is "
        text += (
            f"at least {min(kl for _, kl in lost):.2f} nats where it loses, at most {max(alike):.3f} where all agree."
        )
    return text


def _price_of_epochs(own: Sequence[Row]) -> list[str]:
    """Negative: what several inner epochs lose at the end."""
    found = [(r["surrogate"], float(r["epochs"]), float(r["lr"])) for r in own]
    ends = {run: of(own, "gap_closed", surrogate=run[0], epochs=run[1], lr=run[2]) for run in dict.fromkeys(found)}
    once = max((run for run in ends if run[1] == 1), key=lambda run: ends[run].mean)
    more = max((run for run in ends if run[1] > 1), key=lambda run: ends[run].mean)
    best = "Yet one inner epoch needs no trust region and ends best"
    verdict = best if ends[once] > ends[more] else "Several epochs end best"
    shown = [f"{ends[run].text()} ({run[0]}, {run[1]:g}×{run[2]:g})" for run in (once, more)]
    return [f"{verdict}: {shown[0]} against {shown[1]} with several."]


def _speed(rows: Sequence[Row]) -> list[str]:
    """What several inner epochs gain at first."""
    own = chosen(rows, experiment="grid", surrogate="CLIP", beta=BETA)
    if 10.0 not in values(own, "rollout"):
        return []
    one, four = (at_rollout(chosen(own, epochs=count), "gap_closed", 10) for count in EPOCHS)
    verdict = "Several are quicker" if four > one + NEAR else "Several are not quicker"
    return [f"{verdict}: after 10 rollouts CLIP has closed {four:.2f} with {EPOCHS[1]}, {one:.2f} with {EPOCHS[0]}."]


def baselines(rows: Sequence[Row]) -> list[str]:
    """What does the missing baseline cost? Variance of the gradient, and what is left of the gap."""
    own = chosen(rows, experiment="baselines")
    means, body = values(own, "score_mean"), []
    for name in dict.fromkeys(row["baseline"] for row in own):
        noise = [
            of(own, column, baseline=name, score_mean=means[-1], epochs=1) for column in ("noise_start", "noise_end")
        ]
        ends = product(means, EPOCHS)
        gaps = [of(own, "gap_closed", baseline=name, score_mean=m, epochs=c).text() for m, c in ends]
        body.append([name, *(x.text() for x in noise), *gaps])
    head = ["", f"variance at SFT, mean {means[-1]:g}", "at π*"]
    head += [f"gap closed, mean {m:g}, {c} inner" for m, c in product(means, EPOCHS)]
    text = [_cost(own, mean) for mean in reversed(means)]
    text.append("Variance: of one rollout's gradient, over |∇J|² at SFT. CLIP; the learning rate falls to 0.")
    return [" ".join(text), markdown(head, body)]


def _cost(own: Sequence[Row], mean: float) -> str:
    """None against the batch mean, at one mean score."""
    none, batch = ({"baseline": name, "score_mean": mean} for name in ("none", "batch mean"))
    start, end = (
        of(own, name, epochs=1, **none).mean / of(own, name, epochs=1, **batch).mean
        for name in ("noise_start", "noise_end")
    )
    less = [difference(own, "gap_closed", none | {"epochs": c}, batch | {"epochs": c}) for c in EPOCHS]
    return (
        f"{_verdict(less)} at scores of mean {mean:g}: without a baseline the gradient has {start:.1f} times the "
        f"variance it has with the batch mean at SFT, {end:.0f} times at the optimum, and the gap closed changes by "
        + " and ".join(f"{x.text()} ({c} inner)" for c, x in zip(EPOCHS, less, strict=True))
        + "."
    )


def _verdict(less: Sequence[Estimate]) -> str:
    if not all(x.sure and x.mean < 0 for x in less):
        return "No clear cost"
    return "**Much**" if all(x.mean < -NEAR for x in less) else "Less, but not nothing,"
