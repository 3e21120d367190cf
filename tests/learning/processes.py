"""A fit under `accelerate launch`: writes its losses and final parameters. Run by test_processes.py, and alone."""

import json
import sys
from pathlib import Path

import torch
from tiny import plain_fit, preference_rows

from mixdpo_lib.base import model
from mixdpo_lib.data.pairs import Pairs
from mixdpo_lib.experts import adapters, heads
from mixdpo_lib.gates import weights
from mixdpo_lib.learning import fit, trainer
from mixdpo_lib.policy import mixture


def run(base, family, options, folder=None, stop_after=None):
    """Losses of a fit, and its final parameters as one list."""
    data = Pairs.of(preference_rows(26))
    torch.manual_seed(0)
    made = (
        heads.HeadExperts(base, 2, rank=4)
        if family == "head"
        else adapters.AdapterExperts(base, 2, 4, 1)
    )
    options = dict(options)
    lapse = options.pop("lapse", 0.0)
    policy = mixture.MixturePolicy(made, weights.LearnedWeights(2), beta=0.5, lapse=lapse)
    config = plain_fit(**{"passes": 8.0, "learning_rate": 5e-3, "batch_size": 8, **options})
    if stop_after is not None:  # as a machine that goes down
        step = trainer.MixDPOTrainer.training_step

        def until(self, *args, **rest):
            if self.state.global_step >= stop_after:
                raise KeyboardInterrupt
            return step(self, *args, **rest)

        trainer.MixDPOTrainer.training_step = until
        try:
            fit.fit(policy, data, config, folder=folder)
        except KeyboardInterrupt:
            pass
        trainer.MixDPOTrainer.training_step = step
    result = fit.fit(policy, data, config, folder=folder)
    final = torch.cat([p.detach().flatten() for p in policy.experts.parameters()]).tolist()
    w = [*policy.gate.log_w()[0].exp().tolist(), policy.lapse]
    return {"losses": result.losses, "final": final, "w": w}


CASES = {
    "unit": ("head", {}),
    "pair": ("head", {"latent": "pair"}),
    "prompt": ("head", {"batch_by": "prompt"}),
    "adapter": ("adapter", {}),
    "lapse": ("head", {"lapse": "learn"}),
    "accumulate": ("head", {"batch_size": 2, "accumulate": 4}),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    base = model.load_base(sys.argv[2])
    found = {name: run(base, *case) for name, case in CASES.items()}
    found["resumed"] = run(base, "head", {}, place / "checkpoints", stop_after=17)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        (place / "found.json").write_text(json.dumps(found))
