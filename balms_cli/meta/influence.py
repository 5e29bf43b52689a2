"""Influence: one number an example, and the whole of the bi-level step.

The inner loss is (1/B) sum_i s_i l_i(w), B the batch size or the loss's own denominator; one step of SGD on it leads from
w to w'; the meta loss is read at w'. The meta-learner asks for h_i = d L_meta(w') / d s_i. One SGD step is linear in s, so
no second-order graph is needed:

    v' = mu v + g + lambda w,     w' = w - eta v'          (Nesterov: w' = w - eta (g + lambda w + mu v'))
    h_i = < grad l_i(w), D >,     D = -(eta kappa / B) grad L_meta(w'),     kappa = 1 (Nesterov: 1 + mu)

exactly, for dampening 0 and no clipping, an empty momentum buffer included. Three ways to the same h:

* ``closed-form``, a linear head: grad l_i is an outer product, so h = rowsum(dl/dz * (F D_W^T + D_b)): a matrix product or two;
* ``jvp``, any network: h is the directional derivative of the per-example losses along D, one forward-mode pass;
* ``higher``, the paper's route (Grefenstette et al., 2019): differentiate through the step. Kept as the reference.

Where several processes share the batch and the meta batch, the closed form needs only sums over all of them: of the terms'
denominators, the gradient at w, and the meta gradient at w'.

Shapes: B batch, M meta batch, C classes, D features.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ..losses import SoftmaxLoss

Params = dict[str, Tensor]
Weights = Tensor | float | Callable[[Tensor], Tensor] | None


class Influence(NamedTuple):
    """What one look ahead yields."""

    influence_B: Tensor  # d meta loss / d weight of example i
    losses_B: Tensor  # inner losses at w, unweighted
    grads: Params  # gradient of the weighted inner loss at w: what the real step uses
    meta_loss: Tensor  # meta loss at w', a scalar


def influence(
    model: nn.Module,
    optimizer: torch.optim.SGD,
    loss: SoftmaxLoss,
    batch: tuple[Tensor, Tensor],
    meta_batch: tuple[Tensor, Tensor],
    *,
    weights_B: Weights = None,
    meta_loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    method: str = "auto",
    total: Callable[[Tensor], Tensor] | None = None,
) -> Influence:
    """h_i = d meta_loss(w') / d s_i for every example of ``batch``, at s = ``weights_B`` (default: ones).

    ``model`` maps the inputs of ``batch = (inputs, targets_B)`` to logits [B, C]; ``optimizer`` holds its parameters and
    is not changed, its live momentum buffers and learning rates are used. ``loss`` needs ``per_example``, and may have a
    ``denominator(targets_B)`` other than B. ``method`` is ``closed-form`` (``model`` is ``nn.Linear``), ``jvp``, ``higher``,
    or ``auto``: the first that fits. A model that draws at random in its forward pass (dropout) draws anew in each pass, so
    its h belongs to another draw than ``grads``.

    ``weights_B`` is a tensor [B]; or a function that makes it from the losses at w ([B], detached), for a meta-learner that
    weighs by loss (``MetaWeightNet.weights``); or one number for every example. The number 0 (L2RW looks ahead from there)
    says that ``grads`` are zeros without computing them: ``jvp`` then has no first pass, neither forward nor backward, and
    takes ``losses_B`` from the forward-mode pass. Zeros in a tensor are not looked for.

    ``total`` sums a tensor over the processes that share one step (``World.sum``), each with rows of its own, in any number:
    ``grads`` and ``meta_loss`` are then those of one process with all rows, and ``influence_B`` its part for these. Closed
    form only; ``weights_B`` as numbers, made by who knows all rows; ``meta_loss`` plain cross-entropy or a loss of
    ``balms_cli.losses``, whose terms and denominator can be summed apart.

    Raises ValueError for an optimizer whose step is not the one above or that lacks a parameter, for closed-form on another
    model, and for ``total`` with what it does not do.
    """
    if method == "auto":
        method = "closed-form" if _is_linear_head(model) else "jvp"
    routes = {"closed-form": _closed_form, "jvp": _forward_mode, "higher": _through_higher}
    if method not in routes:
        raise ValueError(f"method {method!r}: choose one of {', '.join(routes)}")
    if not isinstance(optimizer, torch.optim.SGD):
        raise ValueError(f"influence looks one step of torch.optim.SGD ahead, not of {type(optimizer).__name__}")
    if any(group["dampening"] or group["maximize"] for group in optimizer.param_groups):
        raise ValueError("influence is exact for SGD without dampening and without maximize")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if missing := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]:
        raise ValueError(f"the optimizer does not hold '{missing[0]}': add it there, or freeze it by requires_grad_(False)")
    if total is not None and method != "closed-form":
        raise ValueError(f"influence over several processes is computed in closed form, for an nn.Linear, not by {method}")
    if total is not None and callable(weights_B):
        raise ValueError("influence over several processes takes weights as a tensor: a function would see the losses of one")
    if method != "closed-form":
        return routes[method](model, optimizer, loss, batch, meta_batch, weights_B, meta_loss)
    # In the head's own type, as ``Classifier`` runs it: autocast would round the products, and the gradients with them.
    with torch.autocast(batch[1].device.type, enabled=False):
        return _closed_form(model, optimizer, loss, batch, meta_batch, weights_B, meta_loss, total)


def sgd_lookahead(params: Params, grads: Params, optimizer: torch.optim.SGD) -> tuple[Params, dict[str, float]]:
    """Where ``optimizer.step()`` would lead with these gradients (w'), and eta * kappa of each parameter. Pure."""
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    ahead, rate = {}, {}
    for name, w in params.items():
        group = group_of[id(w)]
        eta, mu = float(group["lr"]), group["momentum"]
        g = grads[name].add(w.detach(), alpha=group["weight_decay"])
        buffer = optimizer.state[w].get("momentum_buffer") if w in optimizer.state else None
        v = g if buffer is None else (mu * buffer).add_(g)  # an empty buffer counts as zero
        # In place where a tensor is nobody else's: a head of thousands of classes is large.
        step = (mu * v).add_(g) if group["nesterov"] else v
        ahead[name] = step.mul_(-eta).add_(w.detach())
        rate[name] = eta * (1 + mu if group["nesterov"] else 1)
    return ahead, rate


def _is_linear_head(model: nn.Module) -> bool:
    # A subclass may have another forward, and a frozen bias does not step.
    return type(model) is nn.Linear and all(p.requires_grad for p in model.parameters())


def _closed_form(head, optimizer, loss, batch, meta_batch, weights_B, meta_loss, total=None) -> Influence:
    if not _is_linear_head(head):
        raise ValueError(f"closed form: only for an nn.Linear learnt as a whole, not {type(head).__name__}: use method='jvp'")
    (features_BD, targets_B), (meta_MD, meta_targets_M) = batch, meta_batch
    features_BD, meta_MD = features_BD.to(head.weight.dtype), meta_MD.to(head.weight.dtype)
    params = dict(head.named_parameters())
    logits_BC = F.linear(features_BD, head.weight.detach(), None if head.bias is None else head.bias.detach())
    losses_B, dlogits_BC = _with_gradient(loss, logits_BC, targets_B)
    weights_B = _weights_at(weights_B, losses_B)
    weighted_BC = dlogits_BC if weights_B is None else dlogits_BC * weights_B[:, None]
    count = _denominator(loss, targets_B)
    if total is not None:
        count = total(torch.as_tensor(count, dtype=losses_B.dtype, device=losses_B.device))
    grads = _outer(weighted_BC / count, features_BD, head)
    if total is not None:
        grads = {name: total(g) for name, g in grads.items()}

    ahead, rate = sgd_lookahead(params, grads, optimizer)
    meta_logits_MC = F.linear(meta_MD, ahead["weight"], ahead.get("bias"))
    scale = {name: -r / count for name, r in rate.items()}
    # <grad l_i, D> for every i at once: the products that stand for the second-order graph.
    if total is None:
        meta_value, dmeta_MC = _mean_with_gradient(meta_loss, meta_logits_MC, meta_targets_M)
        along_BC = _along(features_BD, dmeta_MC, meta_MD, scale)
    else:
        meta_value, dmeta_MC = _share_with_gradient(meta_loss, meta_logits_MC, meta_targets_M, total)
        direction = {name: total(g) * scale[name] for name, g in _outer(dmeta_MC, meta_MD, head).items()}
        along_BC = F.linear(features_BD, direction["weight"], direction.get("bias"))
    return Influence((dlogits_BC * along_BC).sum(1), losses_B, grads, meta_value)


def _along(features_BD: Tensor, dmeta_MC: Tensor, meta_MD: Tensor, scale: dict[str, float | Tensor]) -> Tensor:
    """How the logits [B, C] of a linear layer move along D, the gradient of the meta loss times ``scale``: F D_W^T + D_b.

    D_W = dmeta^T meta is a matrix like the layer, of rank M: where classes and features are many it is cheaper not to make it.
    """
    (b, d), (m, c) = features_BD.shape, dmeta_MC.shape
    bias_C = dmeta_MC.sum(0) * scale["bias"] if "bias" in scale else None
    if b * m * (d + c) < (b + m) * c * d:
        along_BC = ((features_BD @ meta_MD.T) * scale["weight"]) @ dmeta_MC
        return along_BC if bias_C is None else along_BC + bias_C
    return F.linear(features_BD, (dmeta_MC.T @ meta_MD) * scale["weight"], bias_C)


def _denominator(loss: SoftmaxLoss, targets_B: Tensor) -> Tensor | int:
    return loss.denominator(targets_B) if hasattr(loss, "denominator") else len(targets_B)


def _weights_at(weights_B: Weights, losses_B: Tensor) -> Tensor | None:
    """The weights as a tensor like ``losses_B``, without a graph; None: all ones."""
    if callable(weights_B):
        weights_B = weights_B(losses_B.detach())
    if isinstance(weights_B, int | float):
        return torch.full_like(losses_B, weights_B)
    return None if weights_B is None else weights_B.detach().to(losses_B)


def _with_gradient(loss: SoftmaxLoss, logits_BC: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
    """The terms of a loss [B] and the derivative of each by its logits [B, C]; row i belongs to example i alone."""
    if getattr(loss, "with_gradient", None):
        return loss.with_gradient(logits_BC, targets_B)
    return _by_autograd(loss.per_example, logits_BC, targets_B)


def _mean_with_gradient(meta_loss: Callable, logits_MC: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """A meta loss (a scalar) and its gradient by the logits [M, C]."""
    if not getattr(meta_loss, "with_gradient", None):
        return _by_autograd(meta_loss, logits_MC, targets_M)
    losses_M, gradient_MC = meta_loss.with_gradient(logits_MC, targets_M)
    count = _denominator(meta_loss, targets_M)
    return (losses_M.sum() / count).to(losses_M.dtype), gradient_MC.div_(count)


def _share_with_gradient(meta_loss: Callable, logits_MC: Tensor, targets_M: Tensor, total: Callable) -> tuple[Tensor, Tensor]:
    """A meta loss over the rows of all processes (a scalar), and its gradient by the logits of this one [M, C]."""
    if meta_loss is F.cross_entropy:
        meta_loss = SoftmaxLoss()
    if not hasattr(meta_loss, "per_example"):
        raise ValueError("influence over several processes needs a meta loss with per_example and denominator, such as "
                         "balms_cli.SoftmaxLoss(): how another one is averaged over the rows cannot be told")  # fmt: skip
    losses_M, gradient_MC = _with_gradient(meta_loss, logits_MC, targets_M)
    count = torch.as_tensor(_denominator(meta_loss, targets_M), dtype=losses_M.dtype, device=losses_M.device)
    count = total(count)
    return total(losses_M.sum()) / count, gradient_MC / count


def _by_autograd(loss: Callable, logits_BC: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        logits_BC = logits_BC.detach().requires_grad_()
        value = loss(logits_BC, targets_B)
        (gradient_BC,) = torch.autograd.grad(value.sum(), logits_BC)
    return value.detach(), gradient_BC


def _outer(dlogits_BC: Tensor, features_BD: Tensor, head: nn.Linear) -> Params:
    """The gradient of a linear head from that of its logits."""
    grads = {"weight": dlogits_BC.T @ features_BD}
    return grads if head.bias is None else grads | {"bias": dlogits_BC.sum(0)}


def _forward_mode(model, optimizer, loss, batch, meta_batch, weights_B, meta_loss) -> Influence:
    (inputs, targets_B), (meta_inputs, meta_targets_M) = batch, meta_batch
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    count = _denominator(loss, targets_B)

    def logits(at: Params, x: Tensor) -> Tensor:
        # BatchNorm in train mode writes its buffers: on clones, so that looking ahead leaves no trace.
        return functional_call(model, {**at, **{n: b.clone() for n, b in model.named_buffers()}}, (x,))

    def terms(at: Params) -> Tensor:
        return loss.per_example(logits(at, inputs), targets_B)

    losses_B, grads = None, {name: torch.zeros_like(p) for name, p in params.items()}
    with torch.enable_grad():
        if not (isinstance(weights_B, int | float) and weights_B == 0):
            losses_B = terms(params)
            weights_B = _weights_at(weights_B, losses_B)
            weighted = losses_B if weights_B is None else losses_B * weights_B
            grads = _gradient(weighted.sum() / count, params)
        ahead, rate = sgd_lookahead(params, grads, optimizer)
        ahead = {name: w.requires_grad_() for name, w in ahead.items()}
        meta_value = meta_loss(logits(ahead, meta_inputs), meta_targets_M)
        meta_grads = _gradient(meta_value, ahead)

    direction = {name: g * (-rate[name] / count) for name, g in meta_grads.items()}
    here = {name: p.detach() for name, p in params.items()}
    # No graph: each layer's tensors go once the next has read them. Of attention only the plain form has a forward mode.
    with torch.no_grad(), _NormsKeepTheType(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own forward mode still scripts its decompositions
        losses_here_B, influence_B = jvp(terms, (here,), (direction,))
    return Influence(influence_B, losses_here_B if losses_B is None else losses_B.detach(), grads, meta_value.detach())


def _gradient(value: Tensor, params: Params) -> Params:
    # Autocast is for forward passes: here it would round the matrix products of layers that ran in float32.
    with torch.autocast(value.device.type, enabled=False):
        return dict(zip(params, torch.autograd.grad(value, params.values()), strict=True))


class _NormsKeepTheType(TorchFunctionMode):
    """Under autocast a norm reads bf16 maps and float32 parameters. Its value comes out in bf16, but its forward-mode
    derivative in float32, which the next layer refuses. So: all in float32, as the kernel does inside, then both rounded."""

    NORMS = (F.batch_norm, F.layer_norm, F.instance_norm)  # group_norm does not mix

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.NORMS and args and args[0].dtype in (torch.bfloat16, torch.float16):
            return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)


def _through_higher(model, optimizer, loss, batch, meta_batch, weights_B, meta_loss) -> Influence:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # higher 0.2.1 (2020) calls torch functions by names since deprecated
        import higher

        (inputs, targets_B), (meta_inputs, meta_targets_M) = batch, meta_batch
        seen: list[Tensor] = []  # the gradients of the step itself, so that the reference costs no pass beyond its own

        def note(grads):
            seen.extend(grads)
            return grads

        with torch.enable_grad(), higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fmodel, diffopt):
            learnt = [(name, p.requires_grad) for name, p in fmodel.named_parameters()]
            losses_B = loss.per_example(fmodel(inputs), targets_B)
            s_B = _weights_at(1.0 if weights_B is None else weights_B, losses_B).clone().requires_grad_()
            inner = (s_B * losses_B).sum() / _denominator(loss, targets_B)
            with torch.autocast(inner.device.type, enabled=False):
                diffopt.step(inner, grad_callback=note)
            meta_value = meta_loss(fmodel(meta_inputs), meta_targets_M)
            influence_B = _gradient(meta_value, {"s_B": s_B})["s_B"]
    grads = {name: g.detach() for (name, learns), g in zip(learnt, seen, strict=True) if learns}
    return Influence(influence_B.detach(), losses_B.detach(), grads, meta_value.detach())
