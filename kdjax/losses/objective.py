"""What is minimised: L = α·L_CE + (1 − α)·Σ_i w_i·f_i(T_i)·D_i(teacher, student at temperature T_i)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kdjax.errors import UserError
from kdjax.losses.divergences import ACROSS, ESTIMATORS, Chosen, choose
from kdjax.losses.features import Feature
from kdjax.losses.policy import IMPORTANCE, TO_GO
from kdjax.losses.schedules import Value, ends


@dataclass(frozen=True)
class Term:
    """One divergence of the objective."""

    divergence: str = "forward_kl"
    """A row of kdjax.losses.DIVERGENCES, with parameters if it has any: jsd(beta=0.1); or of ESTIMATORS, where the
    student answers itself."""
    temperature: Value = 1.0
    """Softens both distributions: a number, or a schedule such as linear(4, 1)."""
    weight: Value = 1.0
    """Of this term in the sum: a number or a schedule."""
    token_weight: str = ""
    """Weighs each token besides: a row of kdjax.losses.TOKEN_WEIGHTS or TO_GO, or importance."""
    scaled: bool = True
    """Multiply by the divergence's own factor (T² for the KLs), so that gradients keep their size as T grows."""
    standardise: bool = False
    """Give both models' logits mean 0 and standard deviation 1 first."""
    clip_token: float = 0.0
    """Cap on the divergence at a token, which then gets no gradient; 0 leaves it out."""
    clip_entry: float = 0.0
    """Cap on the term of each vocabulary entry, p·log(p/q) say, before they are summed; 0 leaves it out. The sum of
    capped terms can be negative."""

    def __post_init__(self) -> None:
        if not min(ends(self.temperature, "temperature")) > 0:
            raise UserError(f"objective.temperature is {self.temperature}; wanted a number above 0")
        if min(ends(self.weight, "a term's weight")) < 0:
            raise UserError(f"a term's weight is {self.weight}; wanted at least 0")
        for name in ("clip_token", "clip_entry"):
            if not getattr(self, name) >= 0:
                raise UserError(f"objective.{name} is {getattr(self, name)}; wanted a cap above 0, or 0 for none")
        chosen = self.chosen
        if (chosen.name == "likelihood_ratio") != (self.token_weight in TO_GO):
            raise UserError(
                f"a term is of {chosen.name} with token_weight {self.token_weight!r}; wanted likelihood_ratio with "
                f"{' or '.join(TO_GO)}, or neither"
            )
        if self.of_own_samples and self.token_weight == IMPORTANCE:
            raise UserError(
                f"a term is of {chosen.name}, which is weighed by importance as it is; leave token_weight out"
            )
        if self.clip_entry and chosen.row.pointwise is None:
            raise UserError(
                f"objective.clip_entry: {chosen.name} is no plain sum over the vocabulary; use clip_token, or a KL"
            )

    @property
    def chosen(self) -> Chosen:
        """The divergence's row and parameters."""
        return choose(self.divergence)

    @property
    def is_across(self) -> bool:
        """Whether it is of a teacher with another tokenizer alone."""
        return self.chosen.name in ACROSS

    @property
    def of_own_samples(self) -> bool:
        """Whether it is right only in the mean over tokens that the student drew."""
        return self.chosen.name in ESTIMATORS

    @property
    def weighed_by_samples(self) -> bool:
        """Whether a weight of its tokens comes from how likely both models make these."""
        return self.of_own_samples or self.token_weight == IMPORTANCE


@dataclass(frozen=True)
class ObjectiveConfig:
    """The objective's parts and weights. Without a teacher only the cross entropy remains."""

    alpha: Value = 0.1
    """Weight of the cross entropy to the data; 1 − alpha is that of the divergence to the teacher. With 1 the teacher
    is not run in training and only measures. A number, or a schedule such as cosine(0, 0.5)."""
    temperature: Value = 1.0
    """Softens both distributions; the divergence is multiplied by its own factor (T² for the KLs). A number, or a
    schedule such as linear(4, 1)."""
    divergence: str = "forward_kl"
    """A row of kdjax.losses.DIVERGENCES, with parameters if it has any: jsd(beta=0.1)."""
    logits: bool = True
    """Compare what the heads give; off, `features` are all there is, as for encoders without a head."""
    chunk_tokens: int | Literal["auto"] = "auto"
    """Tokens whose logits exist at one time: memory against the size of matmuls. auto takes what chunk_mib holds."""
    scaled: bool = True
    """Multiply the divergence by its own factor; off for recipes that do not."""
    standardise: bool = False
    """Give both models' logits mean 0 and standard deviation 1 before they are compared."""
    terms: tuple[Term, ...] = ()
    """Several divergences in one pass over the logits, instead of the one that the fields above name."""
    label_smoothing: float = 0.0
    """Share of the target's weight that all vocabulary entries get evenly, in the cross entropy."""
    z_loss: float = 0.0
    """Weight of (log Σ exp of the student's logits)², which keeps logits from drifting, beside the cross entropy and
    under alpha like it; 1e-4 is common."""
    load_balance: float = 0.001
    """Weight of the loss that keeps a student's router using all its experts alike, by microbatch (and by device under
    pmap); a student without experts has none."""
    chunk_mib: int = 0
    """Memory in MiB that auto gives to one chunk's logits and their gradients; 0: 1024 on a CPU, 2048 elsewhere."""
    implementation: Literal["chunked", "reference"] = "chunked"
    """A row of kdjax.losses.fused.IMPLEMENTATIONS: in chunks, or plain, with logits of all tokens at once."""
    debug: bool = False
    """Count numbers that are not finite in what the loss is given, and name them where a run stops."""
    features: tuple[Feature, ...] = ()
    """Losses of inner layers, added with their own weights."""

    def __post_init__(self) -> None:
        if not all(0 <= end <= 1 for end in ends(self.alpha, "objective.alpha")):
            raise UserError(f"objective.alpha is {self.alpha}; wanted a weight from 0 to 1")
        if self.chunk_tokens != "auto" and not (isinstance(self.chunk_tokens, int) and self.chunk_tokens >= 1):
            raise UserError(f"objective.chunk_tokens is {self.chunk_tokens}; wanted at least 1, or auto")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"objective.label_smoothing is {self.label_smoothing}; wanted a share from 0 to below 1")
        if not self.z_loss >= 0:
            raise UserError(f"objective.z_loss is {self.z_loss}; wanted at least 0")
        if not self.load_balance >= 0:
            raise UserError(f"objective.load_balance is {self.load_balance}; wanted at least 0")
        if self.chunk_mib < 0:
            raise UserError(f"objective.chunk_mib is {self.chunk_mib}; wanted MiB, or 0 for the device's default")
        if not self.logits and not self.features:
            raise UserError("objective.logits is off and there are no features; wanted one of them to learn from")
        single = self._single  # built here, so that what is wrong with it is said now
        if self.of_chunks and any(
            term != Term(term.divergence, weight=term.weight) or term.chosen.name != "alm" for term in self.all_terms
        ):
            raise UserError(
                "alm compares chunks of text, and the objective's other terms or settings are of tokens; leave them "
                "out: alm has a tau of its own and a weight"
            )
        if self.terms and single != Term():
            raise UserError(
                "objective has terms, and divergence, temperature, scaled or standardise beside them; "
                "set these in the terms"
            )

    @property
    def _single(self) -> Term:
        return Term(self.divergence, self.temperature, scaled=self.scaled, standardise=self.standardise)

    @property
    def all_terms(self) -> tuple[Term, ...]:
        """The terms of the sum over i."""
        return self.terms or (self._single,)

    @property
    def of_chunks(self) -> bool:
        """Whether chunks of text are compared, not tokens."""
        return any(term.chosen.name == "alm" for term in self.all_terms)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher has a part in it at any time of the run."""
        return bool(self.features) or ends(self.alpha, "objective.alpha") != (1, 1)
