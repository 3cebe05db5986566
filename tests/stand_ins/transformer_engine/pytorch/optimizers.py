"""AdamW with its step in the group."""

import torch


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        amsgrad=False,
        *,
        bias_correction=True,
        adam_w_mode=True,
        capturable=False,
        master_weights=False,
        master_weight_dtype=torch.float32,
        exp_avg_dtype=torch.float32,
        exp_avg_sq_dtype=torch.float32,
        use_decoupled_grad=False,
        store_param_remainders=False,
        set_grad_none=None,
    ):
        assert adam_w_mode
        assert not any((amsgrad, capturable, master_weights, use_decoupled_grad))
        assert exp_avg_dtype == exp_avg_sq_dtype == torch.float32
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            corrections = [1 - beta ** group["step"] if group["bias_correction"] else 1.0 for beta in group["betas"]]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                state["exp_avg"].lerp_(parameter.grad, 1 - group["betas"][0])
                state["exp_avg_sq"].lerp_(parameter.grad**2, 1 - group["betas"][1])
                update = state["exp_avg"] / corrections[0]
                update /= (state["exp_avg_sq"] / corrections[1]).sqrt() + group["eps"]
                parameter -= group["lr"] * (update + group["weight_decay"] * parameter)


class FusedSGD: ...
