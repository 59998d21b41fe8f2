"""The ordinary training loop that engines are held against."""

from collections.abc import Iterable, Sequence

import torch

from tinsmithd.domain import AdamParams, Datum


def adamw(parameters: Iterable[torch.nn.Parameter], adam: AdamParams) -> torch.optim.AdamW:
    """torch's own optimizer with our settings."""
    return torch.optim.AdamW(
        parameters,
        lr=adam.learning_rate,
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        weight_decay=adam.weight_decay,
    )


def logprobs_of(model: torch.nn.Module, datum: Datum) -> torch.Tensor:
    """Log-probabilities of a datum's targets, `(T,)`, in nats."""
    logits = model(torch.from_numpy(datum.tokens)[None]).logits[0]
    targets = torch.from_numpy(datum.loss_fn_inputs["target_tokens"])
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def train_plainly(
    model: torch.nn.Module, batches: Sequence[Sequence[Datum]], adam: AdamParams
) -> list[float]:
    """Train what has gradients, one datum at a time, a step per two batches; returns the losses."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters, adam)
    losses = []
    for index, batch in enumerate(batches):
        losses.append(0.0)
        for datum in batch:
            weights = torch.from_numpy(datum.loss_fn_inputs["weights"])
            loss = -(logprobs_of(model, datum) * weights).sum()
            loss.backward()
            losses[-1] += float(loss.detach())
        if index % 2:
            if adam.grad_clip_norm:
                torch.nn.utils.clip_grad_norm_(parameters, adam.grad_clip_norm)
            optimizer.step()
            optimizer.zero_grad()
    return losses
