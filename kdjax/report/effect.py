"""The page on a prompt's effect, and the same in a console: what was found in plain words, tables, plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from kdjax.console import amount, count, percent, small, table, visible
from kdjax.errors import UserError
from kdjax.report.effect_plots import effect_plots
from kdjax.report.page import fill

Json = Mapping[str, Any]
Say = Callable[[float], str]
Rows = tuple[list[str], list[list[str]]]
"""Headings, and rows of as many cells."""

SHARES = ("accuracy", "probability", "exact_match", "token_f1", "rouge_l")
"""Measures that are spoken of in points, hundredths of one."""


def write_effect(name: str, found: Json, out: Path) -> Path:
    """Write the page about an analysis, and return its path.

    Raises:
        UserError: it cannot be written.
    """
    page = fill(
        "effect.html",
        name=name,
        found=found,
        sentences=sentences(found),
        tables=tables(found),
        plots=effect_plots(found),
        facts=[(fact.replace("_", " "), str(value)) for fact, value in found["environment"].items()],
    )
    try:
        out.write_text(page, "utf-8")
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {out}: {error.strerror}; name another run directory"
        ) from None
    return out


def effect_table(found: Json) -> RenderableType:
    """Return what a console shows of an analysis: tables, and what was found in words."""
    shown: list[RenderableType] = []
    for title, rows in tables(found).items():
        shown += [Text(title, style="bold"), table(*rows), ""]
    return Group(*shown, *map(Text, sentences(found)))


def tables(found: Json) -> dict[str, Rows]:
    """Return the tables of an analysis by title."""
    made = {
        "Scores": _scores(found),
        "What should not matter, varied": _varied(found),
        "Worked examples": _shots(found),
        "Wanted answers": _inside(found),
        "A request": _cost(found),
    }
    return {title: rows for title, rows in made.items() if rows[1]}


def _scores(found: Json) -> Rows:
    headings = ["", f"{found['measure']} (95 % interval)", "gain over none (95 % interval)"]
    rows = [[_name(one), ranged(one), ranged(one["gain"], "+")] for one in found["prompts"]]
    return headings, [*rows, ["without a prompt", ranged(found["without"]), ""]]


def _name(one: Json) -> str:
    text = " ".join(visible(one["text"]).split())
    shots = f" + {one['shots']} examples" if one["shots"] else ""
    return (text if len(text) <= 60 else text[:59] + "…") + shots


def _varied(found: Json) -> Rows:
    rows = [
        [name, str(len(one["variants"])), ranged(one), amount(one["lowest"]), amount(one["highest"]), _worst(one)]
        for name, one in found["sensitivity"].items()
    ]
    return ["", "variants", "mean (95 % interval)", "lowest", "highest", "lowest is"], rows


def _worst(one: Json) -> str:
    return min(one["variants"], key=lambda variant: variant["score"])["name"]


def _shots(found: Json) -> Rows:
    ways = {"plain": "as they are", "calibrated": "labels calibrated"}
    ways = {way: name for way, name in ways.items() if way in found["shots"]["gain"]}
    ways = ways if len(ways) > 1 else {"plain": found["measure"]}
    headings = ["", *(f"{name} (95 % interval)" for name in ways.values()), "lowest to highest draw"]
    rows = []
    for row in found["shots"]["counts"]:
        ends = "; ".join(f"{amount(row[way]['lowest'])} to {amount(row[way]['highest'])}" for way in ways)
        rows.append([_examples(row["shots"]), *(ranged(row[way]) for way in ways), ends if row["shots"] else ""])
    return headings, rows


def _examples(number: int) -> str:
    return f"{number or 'no'} example{'' if number == 1 else 's'}"


def _inside(found: Json) -> Rows:
    whose = {"prompted": "with the prompt", "unprompted": "without it"}
    headings, rows = ["", "log-likelihood, nats a token"], []
    ways = {"plain": "calibration error", "calibrated": "of labels calibrated"} if "calibration" in found else {}
    for who, name in whose.items():
        errors = [percent(found["calibration"][who][way]["ece"]) for way in ways]
        rows.append([name, ranged(found["likelihood"][who]), *errors])
    return [*headings, *ways.values()], rows


def _cost(found: Json) -> Rows:
    cost, rows = found["cost"], []
    figures = {
        "tokens of the prompt": ("prompt_tokens", count),
        "tokens of the answer": ("answer_tokens", amount),
        "seconds to the first token": ("prefill", small),
        "seconds of each next one": ("decode", small),
        "seconds of a request": ("seconds", small),
        "MB of cache": ("cache_bytes", lambda size: amount(size / 1e6)),
    }
    for name, (key, show) in figures.items():
        rows.append([name, show(cost["with_prompt"][key]), show(cost["without"][key])])
    return ["", "with the prompt", "without it"], rows


def ranged(found: Json, sign: str = "") -> str:
    """Return a mean with its interval: ``0.550 (0.400 to 0.700)``."""
    sign = sign if found["score"] > 0 else ""
    return f"{sign}{amount(found['score'])} ({amount(found['low'])} to {amount(found['high'])})"


def sentences(found: Json) -> list[str]:
    """Return what was found, in plain words."""
    say = _points if found["measure"] in SHARES else _nats
    said = [_of_prompts(found, say), *_of_spreads(found, say), *_of_shots(found, say)]
    return [*said, *_of_calibration(found), *_of_divergence(found), *_of_cost(found)]


def _points(difference: float) -> str:
    return f"{abs(100 * difference):.0f} points"


def _nats(difference: float) -> str:
    return f"{amount(abs(difference))} nats a token"


def _clear(gain: Json) -> str:
    return "" if gain["low"] > 0 or gain["high"] < 0 else ", which may be chance"


def _gain(gain: Json, say: Say, is_one: bool = False) -> str:
    return f"{'gain' if gain['score'] >= 0 else 'lose'}{'s' if is_one else ''} {say(gain['score'])}"


def _of_prompts(found: Json, say: Say) -> str:
    one = found["prompts"][0]
    many = f"The first of {len(found['prompts'])} prompts" if len(found["prompts"]) > 1 else "The prompt"
    ends = f"{amount(found['without']['score'])} to {amount(one['score'])}"
    gains = f"{_gain(one['gain'], say, is_one=True)} over none, {ends}"
    return f"{many} {gains} on {found['examples']} examples{_clear(one['gain'])}."


def _of_spreads(found: Json, say: Say) -> list[str]:
    if not found["sensitivity"]:
        return []
    far = {name: one["highest"] - one["lowest"] for name, one in found["sensitivity"].items()}
    widest = max(far, key=far.__getitem__)
    rest = ", ".join(f"{name} {say(value)}" for name, value in far.items() if name != widest)
    shots = f", with {_examples(found['varied_shots'])} shown" if found["varied_shots"] else ""
    return [
        f"Of what should not matter, most hangs on the {widest}: {say(far[widest])} from the lowest to the "
        f"highest{f' ({rest})' if rest else ''}{shots}."
    ]


def _of_shots(found: Json, say: Say) -> list[str]:
    gain, most = found["shots"]["gain"], found["shots"]["counts"][-1]["shots"]
    if not most:
        return []
    plain = gain["plain"]
    said = f"{_examples(most)} {_gain(plain, say, most == 1)} over none{_clear(plain)}"
    if "calibrated" in gain:
        kept = gain["calibrated"]["score"]
        gone = f"{say(plain['score'] - kept)} of these are gone"
        said += f"; {gone if 0 <= kept < plain['score'] else 'they ' + _gain(gain['calibrated'], say)}"
        said += " once labels are calibrated"
    return [f"{said}."]


def _of_calibration(found: Json) -> list[str]:
    if "calibration" not in found:
        return []
    one = found["calibration"]["prompted"]["calibrated" if found["calibrated"] else "plain"]
    bare = found["calibration"]["unprompted"]["calibrated" if found["calibrated"] else "plain"]
    kind = "sure of itself" if one["confidence"] >= one["accuracy"] else "unsure of itself"
    return [
        f"With the prompt the model is too {kind}: it gives its label {percent(one['confidence'])} on the average and "
        f"is right in {percent(one['accuracy'])}; the calibration error is {percent(one['ece'])} "
        f"({percent(bare['ece'])} without the prompt)."
    ]


def _of_divergence(found: Json) -> list[str]:
    gain, kl = found["likelihood"]["gain"], found["kl"]
    kind = "likelier" if gain["score"] >= 0 else "less likely"
    said = f"The prompt makes the wanted answers {amount(abs(gain['score']))} nats a token {kind}{_clear(gain)}"
    first, last = kl[0], kl[-1]
    later = f", {amount(last['score'])} at token {last['position'] + 1}" if len(kl) > 1 else ""
    return [f"{said}; it moves the model by {amount(first['score'])} nats of KL at an answer's first token{later}."]


def _of_cost(found: Json) -> list[str]:
    cost = found["cost"]
    behind, bare = cost["with_prompt"], cost["without"]
    tokens, cache = behind["prompt_tokens"] - bare["prompt_tokens"], behind["cache_bytes"] - bare["cache_bytes"]
    saved = cost["saved_seconds"]
    said = [
        f"A request carries {count(tokens)} tokens and {cache / 1e6:.2f} MB of cache for the prompt, and takes "
        f"{small(abs(saved))} s {'longer' if saved > 0 else 'less'} here."
    ]
    paid: Sequence[Json] = [cost["break_even"]] if "break_even" in cost else []
    for one in paid:
        what = f"Distilling it for {one['distil_seconds']:,.0f} s"
        when = "is never paid back: no seconds are saved"
        when = when if one["never"] else f"is paid back after {count(one['requests'])} requests, one at a time"
        said.append(f"{what} {when}.")
    return said
