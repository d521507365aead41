"""Students cut out of a model: which units to keep by their importance, and the model with only those, read lazily.

One function takes units along any dimension of any family, since a family's table says each weight's letters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from kdjax.errors import UserError
from kdjax.models.config import ModelConfig
from kdjax.models.convert import hf_config
from kdjax.models.importance import Importance
from kdjax.models.model_file import LazyTensor, ModelFile, layer_of, select_encoder_layers, select_layers, stacked
from kdjax.models.paths import path_text
from kdjax.models.registry import family_named

Picks = Mapping[str, np.ndarray]
"""Letter of a dimension -> which of its units to keep, in order: [n], or [L, n] where each layer kept has its own.

``encoder/F`` is F in the encoder beside a decoder, where that has its own.
"""

ENCODER = "encoder/"
"""Begins the paths of parameters, and the letters of picks, of the encoder beside a decoder."""

FIELDS = {"V": "vocab_size", "D": "width", "H": "heads", "G": "kv_heads", "F": "mlp_width"}
"""Letter of a dimension that units can be taken along -> the field of a config that counts them."""

STACKS = {"L": select_layers, "M": select_encoder_layers}
"""Letter of layers -> what keeps some of them."""

DENSE = {"mixtral": "mistral", "qwen3_moe": "qwen3"}
"""A family with experts -> the same one without."""


@dataclass(frozen=True)
class Cut:
    """What of a teacher its student keeps; None keeps all."""

    layers: int | None = None
    """How many layers."""
    keep_layers: tuple[int, ...] = ()
    """Which layers, counted from 0; these are then all."""
    encoder_layers: int | None = None
    """How many layers of the encoder beside a decoder, whose own are `layers` then."""
    choose: str = "even"
    """How `layers` and `encoder_layers` are chosen: a row of `CHOICES`."""
    mlp: int | None = None
    """Neurons of each mlp."""
    heads: int | None = None
    """Query heads, as many of each group."""
    kv_heads: int | None = None
    """Key/value heads, each with the query heads of its group."""
    width: int | None = None
    """Channels of the embedding, the same ones in all layers."""
    vocab: int | None = None
    """Tokens."""
    dense: bool = False
    """Of each layer's experts only the one that is used most, as an ordinary mlp."""

    def __post_init__(self) -> None:
        if self.choose not in CHOICES:
            raise UserError(f"choose is {self.choose!r}; wanted one of {', '.join(CHOICES)}")
        if self.layers is not None and self.keep_layers:
            raise UserError("layers and keep_layers both say what to keep; give one of them")
        asked = {name: value for name, value in vars(self).items() if value not in (None, ()) and value is not False}
        if asked.keys() == {"choose"}:
            names = [name for name in vars(self) if name != "choose"]
            raise UserError(f"nothing is cut: give {', '.join(names[:-1])} or {names[-1]}")


def even(score_L: np.ndarray, keep: int) -> tuple[int, ...]:
    """Return layers as far apart as they go, the first and the last among them."""
    return tuple(int(layer) for layer in np.linspace(0, len(score_L) - 1, keep).round())


def ends(score_L: np.ndarray, keep: int) -> tuple[int, ...]:
    """Return the first and the last layers, half of each."""
    layers = range(len(score_L))
    return (*layers[: keep - keep // 2], *layers[len(layers) - keep // 2 :])


def by_importance(score_L: np.ndarray, keep: int) -> tuple[int, ...]:
    """Return the layers of the highest scores, in order."""
    return tuple(top(score_L, keep).tolist())


CHOICES: dict[str, Callable[[np.ndarray, int], tuple[int, ...]]] = {
    "even": even,
    "ends": ends,
    "importance": by_importance,
}
"""Ways to choose layers."""


def top(score: np.ndarray, keep: int) -> np.ndarray:
    """Return the places of the `keep` highest scores along the last axis, in order; of equal ones the first."""
    return np.sort(np.argsort(-score, axis=-1, kind="stable")[..., :keep], axis=-1)


def shape(file: ModelFile, cut: Cut) -> ModelConfig:
    """Return the architecture of the student, but for which layers it has where their scores choose.

    Raises:
        UserError: more is to be kept than there is, or the family cannot say such an architecture.
    """
    config, file = _checked(file.config, cut), densified(file) if cut.dense else file
    file = select_layers(file, cut.keep_layers or even(np.zeros(config.layers), cut.layers or config.layers))
    file = select_encoder_layers(file, range(cut.encoder_layers)) if cut.encoder_layers else file
    kv_heads, heads = _head_counts(config, cut)
    sizes = {"V": cut.vocab, "D": cut.width, "F": cut.mlp, "G": kv_heads, "H": heads}
    found = resized(file.config, {letter: size for letter, size in sizes.items() if size is not None})
    try:
        hf_config(found)
    except UserError as error:
        raise UserError(f"{error}{_hint(config, found)}") from error
    return found


def resized(config: ModelConfig, sizes: Mapping[str, int]) -> ModelConfig:
    """Return the architecture with other sizes of some letters; logits over the root of the width (T5) stay so."""
    found = replace(config, **{FIELDS[letter]: size for letter, size in sizes.items()})
    is_over_root = config.head_scale == config.width**-0.5
    return replace(found, head_scale=found.width**-0.5) if is_over_root else found


def _hint(teacher: ModelConfig, student: ModelConfig) -> str:
    """Return how to mend a student that its family cannot say, empty where that is not known."""
    width = student.heads * student.head_width
    if teacher.width == teacher.heads * teacher.head_width and student.width != width:
        return f"; there the width is heads times head width, so cut both: {student.heads} heads with width {width}"
    if teacher.unnormed != student.unnormed:
        return f"; keep layer {teacher.unnormed[0]} first, which reads the embeddings without a norm"
    return ""


def _checked(config: ModelConfig, cut: Cut) -> ModelConfig:
    most = {
        "layers": config.layers,
        "encoder_layers": config.encoder_layers,
        "mlp": config.mlp_width,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "width": config.width,
        "vocab": config.vocab_size,
    }
    for name, size in most.items():
        wanted = getattr(cut, name)
        if wanted is not None and not size:
            raise UserError(f"{name} is {wanted}, but the teacher has no encoder beside a decoder; use layers")
        if wanted is not None and not 1 <= wanted <= size:
            raise UserError(f"{name} is {wanted}; wanted from 1 to the teacher's {size}")
    kv_heads, heads = _head_counts(config, cut)
    if heads % kv_heads or heads // kv_heads > config.heads // config.kv_heads:
        raise UserError(
            f"{heads} heads cannot be those of {kv_heads} groups: the teacher has {config.heads // config.kv_heads} in "
            "each; wanted as many of every group (--heads a multiple of --kv-heads)"
        )
    if cut.vocab is not None and config.encoder_layers:
        raise UserError("vocab is for models of one stack; this teacher has an encoder beside a decoder: leave it out")
    if cut.mlp is not None and config.experts and not cut.dense:
        raise UserError("mlp cuts neurons of one mlp a layer, but this teacher has experts; add --dense")
    if cut.dense and config.family not in DENSE:
        raise UserError(f"dense is for families with experts ({', '.join(DENSE)}); this teacher is a {config.family}")
    return config


def _head_counts(config: ModelConfig, cut: Cut) -> tuple[int, int]:
    """Return how many key/value heads and query heads are kept."""
    in_group = config.heads // config.kv_heads
    own = cut.heads if in_group == 1 else None  # a query head that has keys of its own takes them along
    kv_heads = cut.kv_heads or own or config.kv_heads
    return kv_heads, cut.heads or kv_heads * in_group


def pick(config: ModelConfig, cut: Cut, scores: Importance) -> Picks:
    """Return which units of a model to keep: its layers (L, an encoder's M) always, of the others those that are cut.

    Heads are the same in all layers of a stack whose learned positions are by head (T5). A layer without a norm before
    it is never left out, since no other can stand in its place.
    """
    needed_L = np.where(np.isin(np.arange(config.layers), config.unnormed), np.inf, scores.layer_L)
    keep = cut.keep_layers or CHOICES[cut.choose](needed_L, cut.layers or config.layers)
    picks: dict[str, np.ndarray] = {"L": np.array(keep)}
    stacks = [("", picks["L"], scores.neuron_LF, scores.head_LH)]
    if scores.encoder_layer_M is not None and scores.encoder_head_MH is not None:
        keep = CHOICES[cut.choose](scores.encoder_layer_M, cut.encoder_layers or config.encoder_layers)
        picks["M"] = np.array(keep)
        stacks.append((ENCODER, picks["M"], scores.encoder_neuron_MF, scores.encoder_head_MH))
    if cut.width is not None:
        picks["D"] = top(scores.channel_D, cut.width)
    for stack, keep_L, neuron_LF, head_LH in stacks:
        if cut.mlp is not None and neuron_LF is not None:
            picks[f"{stack}F"] = top(neuron_LF[keep_L], cut.mlp)
        if cut.heads is not None or cut.kv_heads is not None:
            score = head_LH[keep_L].sum(axis=0) if config.positions == "relative" else head_LH[keep_L]
            found = pick_heads(score, config.kv_heads, *_head_counts(config, cut))
            picks |= dict(zip((f"{stack}G", f"{stack}H"), found, strict=True))
    return picks


def pick_heads(score_LH: np.ndarray, groups: int, kv_heads: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the groups whose heads' scores add up to most, and the best heads, as many of each of these groups.

    Scores are [L, H], or [H] where all layers keep the same.
    """
    score_LGH = score_LH.reshape(*score_LH.shape[:-1], groups, -1)
    group_LG = top(score_LGH.sum(axis=-1), kv_heads)
    in_group_LGH = top(np.take_along_axis(score_LGH, group_LG[..., None], axis=-2), heads // kv_heads)
    head_LGH = group_LG[..., None] * score_LGH.shape[-1] + in_group_LGH
    return group_LG, head_LGH.reshape(*score_LH.shape[:-1], heads)


def take(file: ModelFile, picks: Picks) -> ModelFile:
    """Return the model with only some layers, and only some units of some dimensions.

    What is left out was not there: each unit kept computes what it did, but for norms, which go over fewer channels
    (and, where all heads are normalised at once, over fewer heads). An embedding that is scaled by the root of the
    width is stored larger, and the last norm of a head that is tied to it, or scaled by that root itself, smaller, by
    what the root lacks now. Between transform and head (Z) the channels are those of the width.
    """
    for letter, select in STACKS.items():
        file = select(file, picks[letter].tolist()) if letter in picks else file
    before, weights = file.config, family_named(file.config.family).weights_of(file.config)
    config = resized(before, {letter: picks[letter].shape[-1] for letter in FIELDS if letter in picks})
    lost = (before.width / config.width) ** 0.5
    gains = {"embed/embedding": lost} if before.scale_embedding else {}
    if config.head_scale != before.head_scale or (before.scale_embedding and before.tie_head):
        gains |= {f"final_norm/{name}": 1 / lost for name in ("scale", "bias")}
    own = {**picks, "Z": picks["D"]} if "D" in picks else picks
    of_encoder = {**own, **{key.removeprefix(ENCODER): index for key, index in own.items() if key.startswith(ENCODER)}}

    def taken(path: tuple[Any, ...], tensor: LazyTensor) -> LazyTensor:
        name = path_text(path)
        weight, units = weights[name], of_encoder if name.startswith(ENCODER) else own
        for axis, letter in enumerate(weight.ours, start=weight.name.count("{}")):
            if letter in units:
                tensor = _along(tensor, axis, units[letter])
        return _scaled(tensor, gains.get(name, 1.0))

    return replace(file, config=config, tensors=jax.tree_util.tree_map_with_path(taken, file.tensors))


def _along(tensor: LazyTensor, axis: int, index: np.ndarray) -> LazyTensor:
    """Return the entries of a tensor at an index along an axis, or at each layer's own."""
    if index.ndim == 2:
        return stacked([_along(layer_of(tensor, layer), axis - 1, own) for layer, own in enumerate(index)])

    def read(at: tuple[slice, ...]) -> np.ndarray:
        whole = tensor.read((*at[:axis], slice(None), *at[axis + 1 :]))
        return np.take(whole, index[at[axis]], axis)

    return LazyTensor((*tensor.shape[:axis], len(index), *tensor.shape[axis + 1 :]), read)


def _scaled(tensor: LazyTensor, gain: float) -> LazyTensor:
    return tensor if gain == 1.0 else replace(tensor, read=lambda at: tensor.read(at) * np.float32(gain))


def densified(file: ModelFile, expert_L: Sequence[int] | None = None) -> ModelFile:
    """Return the model with one expert of each layer (the first unless said) as its mlp, and no router."""
    experts = [0] * file.config.layers if expert_L is None else expert_L

    def chosen(tensor: LazyTensor) -> LazyTensor:
        return stacked([layer_of(layer_of(tensor, layer), expert) for layer, expert in enumerate(experts)])

    layers = {name: tree for name, tree in file.tensors["layers"].items() if name not in ("experts", "router")}
    layers["mlp"] = jax.tree.map(chosen, file.tensors["layers"]["experts"])
    without = {name: getattr(ModelConfig(), name) for name in ("experts", "experts_per_token", "normalise_picks")}
    config = replace(file.config, family=DENSE[file.config.family], **without)
    return replace(file, config=config, tensors=file.tensors | {"layers": layers})
