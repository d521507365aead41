"""Losses of inner layers: hidden states, relations of attention, in-batch contrast, and their learned projections.

A kind is a small pure function ``f(student, teacher, segment, feature) -> loss`` of one pair of layers, unreduced. To
add one: write the function and give it a row in `FEATURES`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kdjax.errors import UserError, did_you_mean
from kdjax.losses.logits import NOWHERE
from kdjax.losses.terms import kl_terms
from kdjax.shapes import Array, check_shapes


@dataclass(frozen=True)
class Feature:
    """A loss of inner layers, added with its own weight beside α·CE + (1 − α)·f(T)·D."""

    kind: str = "hidden_mse"
    """A row of kdjax.losses.FEATURES."""
    weight: float = 1.0
    """Its factor in the loss; 0 measures only. What is logged under its kind is the mean over tokens and layer pairs,
    without this factor."""
    layers: tuple[tuple[int, int], ...] = ()
    """Pairs (student layer, teacher layer), counted from 0; empty spreads all student layers evenly, last onto last:
    s meets ceil((s + 1)·L_teacher / L_student) − 1."""
    temperature: float = 0.1
    """Of the contrastive loss: what its cosines are divided by."""
    causal: bool = True
    """Relations are with earlier tokens only; where the student is an encoder they are with all."""
    relation_heads: int = 0
    """Heads into which relations cut the queries, keys or values of both models, whatever their own heads are; 0 takes
    the largest number that divides the key/value heads of both."""

    def __post_init__(self) -> None:
        name = f"objective.features {self.kind!r}"
        if self.kind not in FEATURES:
            raise UserError(f"{name} is unknown{did_you_mean(self.kind, FEATURES)}")
        if not 0 <= self.weight < math.inf:
            raise UserError(f"{name}: weight is {self.weight}; wanted 0 or more")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"{name}: temperature is {self.temperature}; wanted a number above 0")
        if self.relation_heads < 0:
            raise UserError(f"{name}: relation_heads is {self.relation_heads}; wanted 1 or more, or 0 for the default")
        for pair in self.layers:
            if len(pair) != 2:
                raise UserError(f"{name}: layers has {pair}; wanted pairs (student layer, teacher layer)")


class Sizes(NamedTuple):
    """What of a model decides how its layers are compared."""

    layers: int
    kv_heads: int
    widths: Mapping[str, int]
    """The width of each tap, all heads together."""
    causal: bool = True


class Kind(NamedTuple):
    """A row of `FEATURES`."""

    function: Callable[[Array, Array, Array, Feature], Array]
    """``f(student_...D, teacher_...D, segment_..., feature) -> loss_...`` in float32; of segment 0 nothing counts."""
    tap: str
    """What it reads of each layer."""
    by_rows: bool = True
    """It compares the rows that the divergence compares, weighted as there, and projects the student's width onto the
    teacher's; otherwise every token of the student's and the teacher's one view, and no projection."""


def hidden_mse(student_ND: Array, teacher_ND: Array, segment_N: Array, feature: Feature) -> Array:
    """Return Σ_d (s_d − t_d)² / D of the residual stream after a layer, s projected where the widths differ.

    Range [0, ∞); 0 exactly at equal hidden states.
    Paper: Jiao et al. 2019, TinyBERT, arXiv:1909.10351 (hidden states); Muralidharan et al. 2024, Compact Language
    Models via Pruning and Knowledge Distillation (Minitron), arXiv:2407.14679.
    """
    del segment_N, feature
    return jnp.mean(jnp.square(student_ND.astype(jnp.float32) - teacher_ND.astype(jnp.float32)), axis=-1)


def hidden_cosine(student_ND: Array, teacher_ND: Array, segment_N: Array, feature: Feature) -> Array:
    """Return 1 − cos(s, t) as ½·|s/|s| − t/|t||², which cancels nothing near 0; a zero vector is orthogonal to all.

    Range [0, 2]; 0 at equal directions, up to a rounding error squared. A zero vector gets no gradient.
    Paper: Sanh et al. 2019, DistilBERT, arXiv:1910.01108 (cosine embedding loss).
    """
    del segment_N, feature
    (student_ND, student_N), (teacher_ND, teacher_N) = _directed(student_ND), _directed(teacher_ND)
    return jnp.where(student_N & teacher_N, 0.5 * jnp.sum(jnp.square(student_ND - teacher_ND), axis=-1), 1.0)


def pooled_cosine(student_BTD: Array, teacher_BTD: Array, segment_BT: Array, feature: Feature) -> Array:
    """Return 1 − cos(s̄, t̄) of the means over each text, which is what sentence encoders give; for each of its tokens.

    Range [0, 2]. Both models have one width, since a mean has no projection.
    Paper: Reimers and Gurevych 2020, arXiv:2004.09813, section 3 (the distance of sentence vectors, squared there).
    """
    same_BTS = (segment_BT[:, :, None] == segment_BT[:, None, :]) & (segment_BT > 0)[:, None, :]
    means = (
        jnp.einsum("bts,bsd->btd", same_BTS.astype(jnp.float32), x.astype(jnp.float32), precision="highest")
        for x in (student_BTD, teacher_BTD)
    )
    student_BTD, teacher_BTD = (x.reshape(-1, x.shape[-1]) for x in means)
    loss_N = hidden_cosine(student_BTD, teacher_BTD, segment_BT.reshape(-1), feature)
    return loss_N.reshape(segment_BT.shape)


def contrastive(student_ND: Array, teacher_ND: Array, segment_N: Array, feature: Feature) -> Array:
    """Return InfoNCE, −log softmax_m(cos(s_n, t_m) / τ) at m = n: each row finds its own among all of the microbatch.

    Range [0, ∞). It does not add up: its negatives are the other rows of the same microbatch (under pmap, of the same
    device), so it changes with accumulation and stands outside the claim that placements agree. Rows of weight 0 are
    neither positives nor negatives. Memory: a float32 [N, N] for each pair of layers.
    Paper: van den Oord et al. 2018, Contrastive Predictive Coding, arXiv:1807.03748, eq. 4; Tian et al. 2019,
    Contrastive Representation Distillation, arXiv:1910.10699.
    """
    (student_ND, _), (teacher_ND, _) = _directed(student_ND), _directed(teacher_ND)
    cosine_NN = jnp.einsum("nd,md->nm", student_ND, teacher_ND, preferred_element_type=jnp.float32)
    logits_NN = jnp.where(segment_N[None, :] > 0, cosine_NN / feature.temperature, NOWHERE)
    return jax.nn.logsumexp(logits_NN, axis=-1) - jnp.diagonal(logits_NN)


def relation(student_BTD: Array, teacher_BTD: Array, segment_BT: Array, feature: Feature) -> Array:
    """Return the mean over relation heads of KL(A_teacher ‖ A_student), A = softmax(x·xᵀ / √K) over visible tokens.

    x are the queries, keys or values of a layer (as attention sees them, so rotated ones), cut into `relation_heads`
    heads of width K; a token sees its segment, in a causal model only itself and what is earlier. Range [0, ∞).
    Relations of one head exist at one time, [B, T, T], and are computed again for the gradient.
    Paper: Wang et al. 2020, MiniLMv2, arXiv:2012.15828 (of encoders there).
    """
    tokens = jnp.arange(segment_BT.shape[1])
    visible_BTS = segment_BT[:, :, None] == segment_BT[:, None, :]
    if feature.causal:
        visible_BTS = visible_BTS & (tokens[:, None] >= tokens[None, :])[None]

    def heads_HBTK(x_BTD: Array) -> Array:
        return jnp.moveaxis(x_BTD.reshape(*x_BTD.shape[:2], feature.relation_heads, -1), 2, 0)

    def log_relation_BTS(x_BTK: Array) -> Array:
        dot_BTS = jnp.einsum("btk,bsk->bts", x_BTK, x_BTK, preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(jnp.where(visible_BTS, dot_BTS / math.sqrt(x_BTK.shape[-1]), NOWHERE), axis=-1)

    def add(loss_BT: Array, heads: tuple[Array, Array]) -> tuple[Array, None]:
        student_BTS, teacher_BTS = map(log_relation_BTS, heads)
        return loss_BT + jnp.sum(kl_terms(teacher_BTS, student_BTS), axis=-1), None

    start_BT = jnp.zeros(segment_BT.shape, jnp.float32)
    loss_BT, _ = lax.scan(jax.checkpoint(add), start_BT, (heads_HBTK(student_BTD), heads_HBTK(teacher_BTD)))
    return loss_BT / feature.relation_heads


def _directed(x_ND: Array) -> tuple[Array, Array]:
    """Return float32 unit vectors, and where they have a direction; a zero vector stays zero and gets no gradient."""
    x_ND = x_ND.astype(jnp.float32)
    square_N = jnp.sum(jnp.square(x_ND), axis=-1)
    has_N = square_N > 0
    inverse_N = jnp.where(has_N, lax.rsqrt(jnp.where(has_N, square_N, 1.0)), 0.0)
    return x_ND * inverse_N[:, None], has_N


def feature_sum(
    feature: Feature, student: Array, teacher: Array, segment: Array, weight: Array, kernel_DD: Array | None = None
) -> Array:
    """Return Σ weight·loss over the tokens of one pair of layers, in float32; the teacher gets no gradient.

    Args:
        feature: its kind says the function; layers and relation heads as `resolved` gives them.
        student: a tap, [N, D] or [B, T, D].
        teacher: likewise; its D may differ where there is a projection.
        segment: of each token, 0 for those that do not count; what stands there changes nothing, be it NaN.
        weight: of each token, divided by the global sum already, so that microbatches and devices add up.
        kernel_DD: projects the student's width onto the teacher's.
    """
    student, teacher = (jnp.where(segment[..., None] > 0, x, 0) for x in (student, lax.stop_gradient(teacher)))
    if kernel_DD is not None:
        kernel_DD = kernel_DD.astype(student.dtype)
        student = jnp.einsum("nd,de->ne", student, kernel_DD, preferred_element_type=jnp.float32)
    function, _, by_rows = FEATURES[feature.kind]
    if by_rows:
        check_shapes(student_ND=student, teacher_ND=teacher)
    return jnp.sum(weight * function(student, teacher, segment, feature))


def resolved(feature: Feature, student: Sizes, teacher: Sizes) -> Feature:
    """Return the feature with its layer pairs and relation heads filled in and checked.

    Raises:
        UserError: a layer that a model does not have, or heads into which a width cannot be cut.
    """
    name, tap = f"objective.features {feature.kind!r}", FEATURES[feature.kind].tap
    pairs = feature.layers or [(s, -(-(s + 1) * teacher.layers // student.layers) - 1) for s in range(student.layers)]
    for pair in pairs:
        for who, layer, sizes in zip(("student", "teacher"), pair, (student, teacher), strict=True):
            if not 0 <= layer < sizes.layers:
                raise UserError(f"{name}: the {who} has no layer {layer}; wanted one from 0 to {sizes.layers - 1}")
    heads = feature.relation_heads or math.gcd(student.kv_heads, teacher.kv_heads)
    for who, sizes in (("student", student), ("teacher", teacher)):
        if FEATURES[feature.kind].function is relation and sizes.widths[tap] % heads:
            raise UserError(
                f"{name}: the {who}'s {tap} of width {sizes.widths[tap]} does not cut into {heads} relation heads; "
                f"wanted a divisor of {math.gcd(student.widths[tap], teacher.widths[tap])}"
            )
    if FEATURES[feature.kind].function is pooled_cosine and student.widths[tap] != teacher.widths[tap]:
        raise UserError(
            f"{name}: the student's {tap} has width {student.widths[tap]}, the teacher's {teacher.widths[tap]}; wanted "
            "one width, since means are not projected"
        )
    return replace(feature, layers=tuple(pairs), relation_heads=heads, causal=student.causal)


def named(features: Iterable[Feature]) -> dict[str, Feature]:
    """Return the features by the name of their sum: the kind, with a number from 1 where a kind comes several times."""
    features = tuple(features)
    kinds = [feature.kind for feature in features]
    numbers = [kinds[: i + 1].count(kind) for i, kind in enumerate(kinds)]
    names = [kind if kinds.count(kind) == 1 else f"{kind}_{n}" for kind, n in zip(kinds, numbers, strict=True)]
    return dict(zip(names, features, strict=True))


def tapped(features: Iterable[Feature], side: int) -> dict[str, tuple[int, ...]]:
    """Return which layers of the student (side 0) or the teacher (side 1) are read, by tap, in rising order."""
    layers: dict[str, set[int]] = {}
    for feature in features:
        layers.setdefault(FEATURES[feature.kind].tap, set()).update(pair[side] for pair in feature.layers)
    return {tap: tuple(sorted(found)) for tap, found in layers.items()}


def projection_name(feature: Feature, pair: tuple[int, int]) -> str:
    """Return ``hidden_mse_1_3``: the projection of a kind from student layer 1 to teacher layer 3."""
    return f"{feature.kind}_{pair[0]}_{pair[1]}"


def projections(features: Iterable[Feature], student: Sizes, teacher: Sizes) -> dict[str, tuple[int, int]]:
    """Return name -> (student's width, teacher's width) of each learned projection: none where the widths agree."""
    return {
        projection_name(feature, pair): widths
        for feature in features
        if (row := FEATURES[feature.kind]).by_rows
        and (widths := (student.widths[row.tap], teacher.widths[row.tap]))[0] != widths[1]
        for pair in feature.layers
    }


def init_projections(widths: Mapping[str, tuple[int, int]], key: Array) -> dict[str, dict[str, Array]]:
    """Return a random kernel_DD for each name, of variance 1/D_student; a draw depends on key and name alone."""
    keys = {name: jax.random.fold_in(key, zlib.crc32(name.encode())) for name in widths}
    return {
        name: {"kernel": jax.random.normal(keys[name], shape) / math.sqrt(shape[0])} for name, shape in widths.items()
    }


FEATURES: dict[str, Kind] = {
    "hidden_mse": Kind(hidden_mse, "hidden"),
    "hidden_cosine": Kind(hidden_cosine, "hidden"),
    "contrastive": Kind(contrastive, "hidden"),
    "pooled_cosine": Kind(pooled_cosine, "hidden", by_rows=False),
    "relation_qq": Kind(relation, "q", by_rows=False),
    "relation_kk": Kind(relation, "k", by_rows=False),
    "relation_vv": Kind(relation, "v", by_rows=False),
}
"""What an inner layer can be compared by."""
