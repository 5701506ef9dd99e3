"""The inner loop against PyTorch, PEFT and torch.optim.AdamW, step by step on the same texts."""

import jax
import numpy as np
import pytest

from seal_jax.inner.packing import pack
from seal_jax.inner.steps import Layout
from seal_jax.inner.texts import make_job, text_of
from seal_jax.inner.update import make_inner_update
from seal_jax.models import lora
from seal_jax.models.weights import save_safetensors
from seal_jax.optim import make_optimizer

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

RANK, ALPHA, LEARNING_RATE = 4, 8.0, 1e-2
NUM_STEPS = 20


def peft_model(folder, adapters):
    """Return PEFT's model of the saved base, with the adapter's initial values."""
    base = transformers.LlamaForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    targets = [target for block in adapters.weights.values() for target in block]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, lora_dropout=0.0)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, ab in peft_weights(model, adapters):
            for part in ("a", "b"):
                name[part].copy_(torch.tensor(ab[part]))
    return model


def peft_weights(model, adapters):
    """Yield PEFT's parameters of each adapted map beside ours in PEFT's shape: lora_B is ours.T."""
    layers = model.base_model.model.model.layers
    for block, targets in adapters.weights.items():
        for target, ab in targets.items():
            for i, layer in enumerate(layers):
                linear = getattr(getattr(layer, {"attn": "self_attn", "mlp": "mlp"}[block]), target)
                theirs = {
                    "a": linear.lora_A["default"].weight,
                    "b": linear.lora_B["default"].weight,
                }
                a, b = (np.asarray(ab[part][0, i]) for part in ("a", "b"))
                yield theirs, {"a": a, "b": b.T}


def train_with_peft(model, job, padded=0):
    """Take the job's steps; each text is padded with 0 to `padded` tokens, which are labels too."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    tx = torch.optim.AdamW(trainable, lr=job.learning_rate, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(tx, lambda step: 1.0 - step / NUM_STEPS)
    losses = []
    for (text,) in job.rows:
        padding = max(0, padded - len(text.tokens))
        tokens = torch.tensor([[*text.tokens, *[0] * padding]])
        mask = torch.tensor([[1] * len(text.tokens) + [0] * padding])
        loss = model(input_ids=tokens, attention_mask=mask, labels=tokens).loss
        tx.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        tx.step()
        rate.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("targets", "padded"),
    [(("q_proj", "v_proj"), 0), (tuple(lora.TARGETS), 0), (("q_proj", "v_proj"), 48)],
    ids=["qv", "all_linear", "padding_in_the_loss"],
)
def test_twenty_steps_equal_peft(tiny, tmp_path, targets, padded):
    config, params = tiny
    save_safetensors(tmp_path, params, config)
    options = {"rank": RANK, "alpha": ALPHA, "targets": targets}
    adapters = jax.jit(lambda key: lora.init_adapter(config, key, **options))(jax.random.key(2))
    rng = np.random.default_rng(0)
    texts = [text_of(rng.integers(1, 64, n).tolist()) for n in (8, 13, 19, 27, 32)]
    options = {"pad_loss": "exact", "padded": padded} if padded else {}
    job = make_job(
        texts, num_epochs=4, batch_size=1, learning_rate=LEARNING_RATE, key=(0,), **options
    )
    assert len(job.rows) == NUM_STEPS

    model = peft_model(tmp_path, adapters)
    their_losses = train_with_peft(model, job, padded)

    tx = make_optimizer(optax_kwargs={"weight_decay": 0.0}, grad_clip=1.0)
    batches = pack([job], layout=Layout((max(32, padded),)), steps_per_call=NUM_STEPS)
    trained, losses = make_inner_update(config, tx, "linear")(params, adapters, batches)

    np.testing.assert_allclose(np.concatenate(losses)[:, 0], their_losses, rtol=1e-4)
    assert their_losses[-1] < 0.95 * their_losses[0]
    for theirs, ours in peft_weights(model, trained):
        for part in ("a", "b"):
            expected = theirs[part].detach().numpy()
            error = np.linalg.norm(ours[part] - expected) / np.linalg.norm(expected)
            assert error < 1e-4
