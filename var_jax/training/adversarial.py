"""The adversarial side of training a tokenizer: a discriminator, its optimiser, and what it asks for.

The discriminator is trained in the same jitted step as the tokenizer, from the step `start` on.  Its
parameters, optimiser and moving means are part of the state (`extra["adversary"]`).
"""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from var_jax.errors import ConfigError
from var_jax.tokenizer.dino import dino_features
from var_jax.tokenizer.discriminator import FeatureHeads, PatchDiscriminator, diff_augment, hinge, lecam
from var_jax.training.optimizer import accumulated_gradients, make_optimizer
from var_jax.training.task import program_flops

NETWORKS = ("patch", "dino")
MEANS_DECAY = 0.99  # of the moving means of the logits (Tseng et al. 2021)


class Adversary:
    """Discriminator and its part of the step."""

    def __init__(self, cfg: ConfigDict, train: ConfigDict, steps: int, image_size: int, dtype: jnp.dtype):
        """Raises ConfigError on a field that cannot be."""
        if cfg.network not in NETWORKS:
            raise ConfigError(f"config.adversarial.network must be one of {NETWORKS}, got {cfg.network!r}")
        for name in ("start_fraction", "warmup_fraction"):
            if not 0 <= cfg[name] < 1:
                raise ConfigError(f"config.adversarial.{name} must be a share in [0, 1), got {cfg[name]}")
        for name in ("weight", "r1", "lecam", "min_ratio"):
            if cfg[name] < 0:
                raise ConfigError(f"config.adversarial.{name} must be 0 or more, got {cfg[name]}")
        if cfg.network == "patch" and image_size < 2 ** (cfg.layers + 1):
            raise ConfigError(
                f"config.adversarial.layers={cfg.layers} leaves nothing of images of {image_size} pixels: "
                "fewer layers, or adversarial.weight=0"
            )
        self.cfg, self.dtype, self.image_size = cfg, dtype, image_size
        self.start, self.rise = int(cfg.start_fraction * steps), max(1, round(cfg.warmup_fraction * steps))
        if cfg.network == "patch":
            self.model = PatchDiscriminator(cfg.channels, cfg.layers, dtype)
        else:
            self.model = FeatureHeads(cfg.channels, dtype)
        own = ConfigDict({**train.to_dict(), **cfg.train.to_dict()})
        self.accumulate, self.optimizer = train.grad_accum_steps, make_optimizer(own, steps - self.start)

    def init(self, key: jax.Array, frozen: dict) -> dict:
        """Parameters with logical axis names, their optimiser, and moving means of the logits."""
        blank = jnp.zeros((1, self.image_size, self.image_size, 3))
        seen = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(self._seen, frozen, blank))
        params = self.model.init(key, seen)["params"]
        return {"params": params, "opt_state": self.optimizer.init(params), "means": jnp.zeros(2)}

    def flops_per_image(self, params: dict, frozen: dict) -> float:
        """Of the discriminator in a step: for the tokenizer forward and back, for itself both twice.

        The features of DINO, which is frozen, are not counted.
        """
        blank = jax.ShapeDtypeStruct((1, self.image_size, self.image_size, 3), jnp.float32)
        seen = jax.eval_shape(self._seen, frozen, blank)
        return 8 * program_flops(lambda p, x: self.model.apply({"params": p}, x), params, seen)

    def weight(self, step: jax.Array) -> jax.Array:
        """0 before the start, then rising in a line to the full weight."""
        return self.cfg.weight * jnp.clip((step - self.start + 1) / self.rise, 0, 1)

    def logits(self, params: dict, frozen: dict, images: jax.Array, key: jax.Array) -> jax.Array:
        """Images [B, H, W, 3] in [-1, 1] -> logits [B, n], the images augmented where the config says."""
        if self.cfg.augment:
            images = diff_augment(images, key)
        return self.model.apply({"params": params}, self._seen(frozen, images))

    def generator_loss_and_grad(
        self, adversary: dict, frozen: dict, images: jax.Array, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The generator's loss: how far reconstructions [B, H, W, 3] are from looking real.

        Returns:
          The loss and its gradient to the images, both 0 before the start.
        """

        def loss(images):
            return -self.logits(adversary["params"], frozen, images, key).mean()

        blank = (jnp.zeros(()), jnp.zeros_like(images))
        return jax.lax.cond(step >= self.start, jax.value_and_grad(loss), lambda _: blank, images)

    def train_step(
        self, adversary: dict, frozen: dict, real: jax.Array, fake: jax.Array, key: jax.Array, step: jax.Array
    ) -> tuple[dict, dict]:
        """One step of the discriminator on images and their reconstructions [B, H, W, 3] in [-1, 1].

        Returns:
          The adversary's state and metrics: `discriminator` (its hinge loss), the mean logits, and
          `discriminator_gradient_norm`.
        """
        fake = jax.lax.stop_gradient(fake)

        def loss(params, part, key):
            return self._loss(params, adversary["means"], frozen, part, key)

        def learn(adversary):
            grads, (metrics, _) = accumulated_gradients(
                jax.grad(loss, has_aux=True),
                adversary["params"],
                {"real": real, "fake": fake},
                key,
                self.accumulate,
            )
            updates, opt_state = self.optimizer.update(grads, adversary["opt_state"], adversary["params"])
            now = jnp.stack([metrics["logits_real"], metrics["logits_fake"]])
            means = MEANS_DECAY * adversary["means"] + (1 - MEANS_DECAY) * now
            params = optax.apply_updates(adversary["params"], updates)
            metrics["discriminator_gradient_norm"] = optax.tree.norm(grads)
            return {"params": params, "opt_state": opt_state, "means": means}, metrics

        names = ("discriminator", "logits_real", "logits_fake", "discriminator_gradient_norm")
        idle = {name: jnp.zeros(()) for name in names}
        return jax.lax.cond(step >= self.start, learn, lambda adversary: (adversary, idle), adversary)

    def _loss(self, params, means, frozen, part, key):
        """Hinge, and what is asked of the discriminator beside it -> loss, (metrics, nothing)."""
        real_key, fake_key = jax.random.split(key)
        judge = lambda images: self.logits(params, frozen, images, real_key)  # noqa: E731
        real, fake = judge(part["real"]), self.logits(params, frozen, part["fake"], fake_key)
        loss = hinge(real, fake)
        metrics = {"discriminator": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        if self.cfg.lecam:
            loss += self.cfg.lecam * lecam(real, fake, means)
        if self.cfg.r1:  # Mescheder et al. 2018: half the squared gradient at real images
            slope = jax.grad(lambda images: judge(images).mean(1).sum())(part["real"])
            loss += self.cfg.r1 / 2 * jnp.sum(slope**2, axis=(1, 2, 3)).mean()
        return loss, (metrics, ())

    def _seen(self, frozen: dict, images: jax.Array):
        """What the discriminator looks at: the images, or DINO's features of them."""
        return (
            images if self.cfg.network == "patch" else dino_features(frozen["dino"], images, dtype=self.dtype)
        )
