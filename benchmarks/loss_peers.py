"""Others' distillation losses in PyTorch, behind one face: numpy in, a closure out. All parts are optional.

    pip install -e ".[peers]" && pip install --no-deps liger-kernel==0.8.5

Liger-Kernel asks for Triton, but on a CPU runs without it, hence --no-deps.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np

from kdjax.shapes import Array

Result = tuple[Any, Any, Any]
"""value, dh_ND and dw_VD, torch tensors."""
Loss = Callable[..., Any]
"""(student_ND, student_VD, teacher_ND, teacher_VD, targets_N) -> the mean loss, a torch scalar."""


class Problem(NamedTuple):
    """What a loss is given, in numpy (bfloat16 by ml_dtypes); every token has weight 1/N."""

    student_ND: Array
    student_DV: Array
    teacher_ND: Array
    teacher_DV: Array
    targets_N: Array


class Peer(NamedTuple):
    """A row of `PEERS`.

    Attributes:
        make: of (alpha, beta) -> alpha·cross entropy + (1 − alpha)·divergence, where beta 0 is forward KL, 1 reverse
            KL, and between them JSD with that weight on the teacher.
        has_ce: whether it has a cross entropy; if not, alpha does nothing and the divergence has weight 1.
        copies: float32 arrays [tokens, V] that would hold its peak with float32 and with bfloat16 inputs, at beta 0.5;
            measured, to refuse what would not fit.
        chunk: tokens whose logits exist at one time; 0 is all.
        cost: its time as a multiple of the bare matmuls', to plan with.
        needs_cuda: whether it runs on a GPU alone.
    """

    make: Callable[[float, float], Loss]
    has_ce: bool
    copies: tuple[float, float]
    chunk: int
    cost: float
    needs_cuda: bool = False


def torch_on_all_cores() -> Any:
    """Return torch, with all cores; threads that wait do not spin, which on a busy machine costs it half its speed."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    torch = importlib.import_module("torch")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(cores)
    return torch


def plain(alpha: float, beta: float) -> Loss:
    """Return cross entropy and divergence on whole logits, as one writes it in PyTorch."""
    torch = torch_on_all_cores()
    functional = torch.nn.functional

    def loss(student_ND, student_VD, teacher_ND, teacher_VD, targets_N):
        student_NV = (student_ND @ student_VD.T).float()
        with torch.no_grad():
            teacher_log_NV = functional.log_softmax((teacher_ND @ teacher_VD.T).float(), -1)
        student_log_NV = functional.log_softmax(student_NV, -1)
        ce = functional.nll_loss(student_log_NV, targets_N)
        return alpha * ce + (1 - alpha) * _divergence(torch, student_log_NV, teacher_log_NV, beta)

    return loss


def _divergence(torch: Any, student_NV: Any, teacher_NV: Any, beta: float) -> Any:
    kl = torch.nn.functional.kl_div  # of (log q, log p): KL(p ‖ q)
    options = {"reduction": "batchmean", "log_target": True}
    if beta in (0, 1):
        pair = (student_NV, teacher_NV) if beta == 0 else (teacher_NV, student_NV)
        return kl(*pair, **options)
    mixed_NV = torch.logaddexp(teacher_NV + float(np.log(beta)), student_NV + float(np.log1p(-beta)))
    return beta * kl(mixed_NV, teacher_NV, **options) + (1 - beta) * kl(mixed_NV, student_NV, **options)


def trl(alpha: float, beta: float) -> Loss:
    """Return TRL's generalized JSD (GKDTrainer.generalized_jsd_loss) on whole logits; it has no cross entropy."""
    torch_on_all_cores()
    jsd = _trl_trainer().generalized_jsd_loss

    def loss(student_ND, student_VD, teacher_ND, teacher_VD, targets_N):
        teacher_NV = (teacher_ND @ teacher_VD.T).detach()
        return jsd(student_ND @ student_VD.T, teacher_NV, beta=beta, reduction="batchmean")

    return loss


def _trl_trainer() -> Any:
    for module in ("trl.trainer.gkd_trainer", "trl.experimental.gkd.gkd_trainer"):
        try:
            return importlib.import_module(module).GKDTrainer
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
    raise ModuleNotFoundError("trl (or it has no GKDTrainer)", name="trl")


def trl_chunked(alpha: float, beta: float) -> Loss:
    """Return the loss of TRL's DistillationTrainer, on tiles of logits; it has no cross entropy."""
    torch = torch_on_all_cores()
    of = importlib.import_module("trl.trainer.distillation_trainer")._chunked_divergence_loss

    def loss(student_ND, student_VD, teacher_ND, teacher_VD, targets_N):
        mask_1N = torch.ones_like(targets_N)[None]
        return of(student_ND[None], teacher_ND[None], student_VD, teacher_VD, mask_1N, beta)[0]

    return loss


def liger(alpha: float, beta: float, *, compiled: bool) -> Loss:
    """Return Liger-Kernel's chunked distillation loss, 1,024 tokens at a time."""
    torch_on_all_cores()
    module = importlib.import_module("liger_kernel.chunked_loss")
    return module.LigerFusedLinearJSDLoss(alpha, 1 - alpha, beta=beta, compiled=compiled)


def liger_triton(alpha: float, beta: float) -> Loss:
    """Return Liger-Kernel's fused linear JSD in Triton; it has no cross entropy."""
    return importlib.import_module("liger_kernel.transformers").LigerFusedLinearJSD(jsd_beta=beta)


PEERS: dict[str, Peer] = {
    "torch plain": Peer(plain, True, (10, 10), 0, 4.0),
    "TRL": Peer(trl, False, (17, 9), 0, 6.0),
    "TRL chunked": Peer(trl_chunked, False, (6, 6), 0, 5.0),
    "Liger eager": Peer(partial(liger, compiled=False), True, (20, 16), 1024, 4.5),
    "Liger compiled": Peer(partial(liger, compiled=True), True, (7, 4), 1024, 2.5),
    "Liger Triton": Peer(liger_triton, False, (4, 4), 1024, 1.5, needs_cuda=True),
}
"""Name -> how to make it. To add one: a function of alpha and beta, and a row."""


def to_torch(x: Array, device: str) -> Any:
    """Return a copy as a torch tensor; bfloat16 goes by its bits."""
    torch = torch_on_all_cores()
    x = np.ascontiguousarray(x)
    if x.dtype.name == "bfloat16":
        return torch.tensor(x.view(np.int16), device=device).view(torch.bfloat16)
    return torch.tensor(x.astype(np.int64) if x.dtype.kind == "i" else x, device=device)


def place(problem: Problem, device: str) -> tuple[Any, ...]:
    """Return the loss's arguments: matrices as [V, D], the student's asking for gradients."""
    student_ND, student_VD, teacher_ND, teacher_VD, targets_N = (
        to_torch(x, device)
        for x in (
            problem.student_ND,
            problem.student_DV.T,
            problem.teacher_ND,
            problem.teacher_DV.T,
            problem.targets_N,
        )
    )
    return student_ND.requires_grad_(), student_VD.requires_grad_(), teacher_ND, teacher_VD, targets_N


def closure(loss: Loss, arguments: tuple[Any, ...]) -> Callable[[], Result]:
    """Return a function that computes value and gradients once and waits for them."""
    torch = torch_on_all_cores()
    is_cuda = arguments[0].is_cuda

    def run() -> Result:
        value = loss(*arguments)
        dh_ND, dw_VD = torch.autograd.grad(value, arguments[:2])
        if is_cuda:
            torch.cuda.synchronize()
        return value.detach(), dh_ND, dw_VD

    return run


def in_numpy(result: Result) -> tuple[float, Array, Array]:
    """Return value, dh_ND and dw_DV in float32."""
    value, dh_ND, dw_VD = result
    return float(value), dh_ND.float().cpu().numpy(), dw_VD.float().cpu().numpy().T


def device_for(platform: str) -> str:
    """Return torch's name of the device that JAX runs on."""
    return "cuda" if platform == "gpu" and torch_on_all_cores().cuda.is_available() else "cpu"


def cuda_growth(run: Callable[[], Any]) -> int | None:
    """Return the GPU memory that torch's allocator held at most while running, over what it held before."""
    torch = torch_on_all_cores()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def cuda_free() -> int:
    """Return the bytes of GPU memory that nobody holds."""
    return torch_on_all_cores().cuda.mem_get_info()[0]


def versions() -> dict[str, str]:
    """Return the versions of what is installed of torch and the peers' packages."""
    found = {}
    for name in ("torch", "trl", "liger-kernel"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
