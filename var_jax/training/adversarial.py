"""Adversarial training of a tokenizer: discriminator, its optimizer, and the generator's loss.

The discriminator is trained in the same jitted step as the tokenizer, from step `start` on. Its parameters,
optimizer state and moving means are part of the training state (`extra["adversary"]`).
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

DISCRIMINATORS = ("patch", "dino")
MEANS_DECAY = 0.99  # of the moving means of the logits (LeCam; Tseng et al. 2021)


class Adversary:
    """Discriminator of a tokenizer, its losses and its part of the training step.

    Attributes:
      start: first step of adversarial training.
      warmup: number of steps over which the weight of the generator's loss rises.
    """

    def __init__(self, cfg: ConfigDict, train: ConfigDict, steps: int, image_size: int, dtype: jnp.dtype):
        """Build the discriminator and its optimizer.

        Args:
          cfg: section `adversarial` of the stage.
          train: section `train` of the stage; `cfg.train` takes precedence.
          steps: total number of steps.
          image_size: side of the images in pixels.
          dtype: of the discriminator's products.

        Raises:
          ConfigError: if a field is out of range; names it.
        """
        if cfg.network not in DISCRIMINATORS:
            raise ConfigError(
                f"config.adversarial.network must be one of {DISCRIMINATORS}, got {cfg.network!r}"
            )
        for name in ("start_fraction", "warmup_fraction"):
            if not 0 <= cfg[name] < 1:
                raise ConfigError(f"config.adversarial.{name} must be a share in [0, 1), got {cfg[name]}")
        for name in ("weight", "r1", "lecam", "min_ratio"):
            if cfg[name] < 0:
                raise ConfigError(f"config.adversarial.{name} must be 0 or more, got {cfg[name]}")
        if cfg.network == "patch" and image_size < 2 ** (cfg.layers + 1):
            raise ConfigError(
                f"config.adversarial.layers={cfg.layers} leaves nothing of images of {image_size} pixels; "
                "use fewer layers, or adversarial.weight=0"
            )
        self.cfg = cfg
        self.dtype = dtype
        self.image_size = image_size
        self.start = int(cfg.start_fraction * steps)
        self.warmup = max(1, round(cfg.warmup_fraction * steps))
        if cfg.network == "patch":
            self.model = PatchDiscriminator(cfg.channels, cfg.layers, dtype)
        else:
            self.model = FeatureHeads(cfg.channels, dtype)
        self.microbatches = train.grad_accum_steps
        train = ConfigDict({**train.to_dict(), **cfg.train.to_dict()})
        self.optimizer = make_optimizer(train, steps - self.start)

    def init(self, key: jax.Array, frozen: dict) -> dict:
        """Initialize parameters with logical axis names, optimizer state and moving means of the logits."""
        blank = jnp.zeros((1, self.image_size, self.image_size, 3))
        inputs = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(self._inputs, frozen, blank))
        params = self.model.init(key, inputs)["params"]
        return {"params": params, "opt_state": self.optimizer.init(params), "means": jnp.zeros(2)}

    def flops_per_image(self, params: dict, frozen: dict) -> float:
        """Return the FLOPs of the discriminator in a step, per image.

        A step takes as much as 8 forward passes: 2 for the generator (forward, and backward to the images), 6
        for the discriminator (forward and backward on real and fake images). The frozen DINO is not counted.
        """
        blank = jax.ShapeDtypeStruct((1, self.image_size, self.image_size, 3), jnp.float32)
        inputs = jax.eval_shape(self._inputs, frozen, blank)
        return 8 * program_flops(lambda p, x: self.model.apply({"params": p}, x), params, inputs)

    def weight(self, step: jax.Array) -> jax.Array:
        """Return the weight of the generator's loss: 0 before the start, then a linear warm-up."""
        return self.cfg.weight * jnp.clip((step - self.start + 1) / self.warmup, 0, 1)

    def logits(self, params: dict, frozen: dict, images: jax.Array, key: jax.Array) -> jax.Array:
        """Compute logits [B, n] of images [B, H, W, 3] in [-1, 1], augmented if `cfg.augment` is set."""
        if self.cfg.augment:
            images = diff_augment(images, key)
        return self.model.apply({"params": params}, self._inputs(frozen, images))

    def generator_loss_and_grad(
        self, adversary: dict, frozen: dict, images: jax.Array, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Compute the generator's loss, minus the mean logit of reconstructions, and its gradient.

        Args:
          adversary: the discriminator's part of the state.
          frozen: frozen networks of the task.
          images: reconstructions [B, H, W, 3] in [-1, 1].
          key: random key of the augmentation.
          step: int32 scalar.

        Returns:
          Scalar loss and its gradient with respect to the images; both 0 before the start.
        """

        def loss(images):
            return -self.logits(adversary["params"], frozen, images, key).mean()

        zeros = (jnp.zeros(()), jnp.zeros_like(images))
        return jax.lax.cond(step >= self.start, jax.value_and_grad(loss), lambda _: zeros, images)

    def train_step(
        self, adversary: dict, frozen: dict, real: jax.Array, fake: jax.Array, key: jax.Array, step: jax.Array
    ) -> tuple[dict, dict]:
        """Take one optimizer step of the discriminator; none before the start.

        Args:
          adversary: the discriminator's part of the state.
          frozen: frozen networks of the task.
          real, fake: images and their reconstructions [B, H, W, 3] in [-1, 1].
          key: random key of the augmentation.
          step: int32 scalar.

        Returns:
          The new part of the state, and metrics: `discriminator` (hinge loss), mean logits, and
          `discriminator_gradient_norm`.
        """
        fake = jax.lax.stop_gradient(fake)

        def loss(params, part, key):
            return self._loss(params, adversary["means"], frozen, part, key)

        def update(adversary):
            grads, (metrics, _) = accumulated_gradients(
                jax.grad(loss, has_aux=True),
                adversary["params"],
                {"real": real, "fake": fake},
                key,
                self.microbatches,
            )
            updates, opt_state = self.optimizer.update(grads, adversary["opt_state"], adversary["params"])
            batch_means = jnp.stack([metrics["logits_real"], metrics["logits_fake"]])
            means = MEANS_DECAY * adversary["means"] + (1 - MEANS_DECAY) * batch_means
            params = optax.apply_updates(adversary["params"], updates)
            metrics["discriminator_gradient_norm"] = optax.tree.norm(grads)
            return {"params": params, "opt_state": opt_state, "means": means}, metrics

        names = ("discriminator", "logits_real", "logits_fake", "discriminator_gradient_norm")
        zeros = {name: jnp.zeros(()) for name in names}
        return jax.lax.cond(step >= self.start, update, lambda adversary: (adversary, zeros), adversary)

    def _loss(self, params, means, frozen, part, key):
        """Compute the discriminator's loss: hinge, plus LeCam and R1 regularization if enabled.

        Returns:
          Loss, and (metrics, no outputs), as `accumulated_gradients` takes them.
        """
        real_key, fake_key = jax.random.split(key)
        real_logits = lambda images: self.logits(params, frozen, images, real_key)
        real = real_logits(part["real"])
        fake = self.logits(params, frozen, part["fake"], fake_key)
        loss = hinge(real, fake)
        metrics = {"discriminator": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        if self.cfg.lecam:
            loss += self.cfg.lecam * lecam(real, fake, means)
        if self.cfg.r1:  # Mescheder et al. 2018: half the squared gradient at real images
            gradient = jax.grad(lambda images: real_logits(images).mean(1).sum())(part["real"])
            loss += self.cfg.r1 / 2 * jnp.sum(gradient**2, axis=(1, 2, 3)).mean()
        return loss, (metrics, ())

    def _inputs(self, frozen: dict, images: jax.Array):
        """Return the discriminator's input: the images, or their DINO features."""
        if self.cfg.network == "patch":
            return images
        return dino_features(frozen["dino"], images, dtype=self.dtype)
