"""Loss heads: pure functions per example, each with its derivatives of every order in closed form beneath it.

z are the logits, p = softmax(z), J = diag(p) - ppᵀ, P = I - 1pᵀ, c the label, e its one-hot vector, y a soft label, σ
the logistic function, u = 1 - p_c. `logits_hessian` returns the Hessian (element by element where a single number
stands) as an operator. Options: A is `axis`, W is `where`, T is `temperature`, I is `ignore_index`.

| head | loss | gradient | Hessian | options | elsewhere |
|---|---|---|---|---|---|
| softmax_cross_entropy_with_integer_labels | L = lse(z) - z_c | p - e | J | A W I B | optax, torch |
| softmax_cross_entropy, safe_softmax_cross_entropy | Σ y (lse(z) - z) | (Σy) p - y | (Σy) J | A W B | optax, torch |
| focal_loss_with_integer_labels | f(L) = u^γ L | f′ (p - e) | f′ J + f″ (p - e)(p - e)ᵀ | gamma A W I | Lin et al. |
| poly_loss_cross_entropy | Σ y (lse(z) - z + ε (1-p)) | h - y | Pᵀ diag(h) P, h = (Σy) p - εJy | epsilon A W | optax |
| softmax_kl_divergence | KL(q‖p), q the target | (p - q)/T | J/T² | A W T | torch.nn.KLDivLoss |
| jensen_shannon_divergence | ½KL(p‖m) + ½KL(q‖m) | g = ½ J log(p/m) | Pᵀ diag(¼pq/m + g) P | A W T | scipy |
| softmax_entropy | -Σ p log p | g = -Jz | Pᵀ diag(g - p) P | A W | distrax |
| brier_loss | ½ Σ (p - y)² | g = J(p - y) | Pᵀ diag(p² + g) P | A W | scikit-learn (twice it) |
| entmax_loss, multiclass_sparsemax_loss | Fenchel-Young of α-entmax p | p - y | J of α-entmax | alpha A W I | optax |
| sigmoid_binary_cross_entropy | L = ωy sp(-z) + (1-y) sp(z) | L′ | (ωy+1-y) σ(z)σ(-z) | pos_weight | optax, torch |
| sigmoid_focal_loss | α_t (1 - p_t)^γ L | chain rule | chain rule | alpha gamma | optax |
| sparsemax_loss | Fenchel-Young of s = clip((z + 1)/2, 0, 1) | s - y | ½ where 0 < s < 1 | | optax |
| kl_divergence, kl_divergence_with_log_targets | Σ t (log t - z), z = log q | -t | 0 | A W | optax |
| generalized_kl_divergence, convex_kl_divergence | Σ t (log t - z) - t + q | q - t | diag(q) | A W | optax |
| squared_error, sum_squared_error | (z - y)² | 2 (z - y) | 2 | A of the sum | optax |
| l2_loss | (z - y)²/2 | z - y | 1 | | optax |
| huber_loss | (z - y)²/2, linear beyond δ | clip(z - y, -δ, δ) | 1 within δ | delta | optax |
| log_cosh | log cosh(z - y) | tanh(z - y) | sech²(z - y) | | optax |

Here sp is softplus, L′ = (1-y)σ(z) - ωyσ(-z). B: `softmax_cross_entropy` takes `label_smoothing` and `class_weights`,
with integer labels `ignore_index` and `z_loss` as well, in any combination: with the weights y that smoothing and
class weights give to the classes, s = Σy and z-loss ζ,

    s lse(z) - <y,z> + ζ lse(z)²,    gradient (s + 2ζ lse(z)) p - y,    Hessian (s + 2ζ lse(z)) J + 2ζ ppᵀ.

Every head takes transformed logits: `softcap_logits(z, c)` = c tanh(z/c), where an excluded class stays excluded, has
gradient t∘g and Hessian diag(t) H diag(t) + diag(g∘t′), with t = sech²(z/c); z/T has g/T and H/T².
`weighted_mean(losses, weights)`, in which 0/0 is 0, has torch's reductions. `logits_ggn` and `logits_fisher` are the
Gauss-Newton part of the Hessian and the Fisher matrix, with a factor and with targets drawn from the model;
`natural_gradient_norm` is gᵀJ⁺g = exp(L) - 1.

Special values, the same in value, forward and reverse mode and at second order, in every dtype:

| logits or label | p | log p | logsumexp | loss | its gradient |
|---|---|---|---|---|---|
| a logit of -inf, label elsewhere | 0 there | -inf there | without it | without it | 0 there |
| a label on it, hard or soft | | | | +inf | not NaN |
| one logit of +inf, label on it | one-hot | 0 there, else -inf | +inf | 0 | 0 |
| one logit of +inf, label elsewhere | | | | +inf | not NaN |
| several of +inf (of entmax NaN) | equal shares | as of equal ones | +inf | as of equal ones | as of equal ones |
| all -inf | NaN | NaN | -inf | NaN | NaN |
| NaN | NaN in its slice | NaN in its slice | NaN | NaN | NaN in its slice |
| where=False, whatever stands there | 0 there | -inf there | without it | without it | 0 there |
| a label on it | | | | +inf | not NaN |
| all masked | 0 | -inf | -inf | 0 | 0 |
| an integer label outside [0, K) | | | | NaN | NaN |
| ignored (`ignore_index`), or an example masked | | | | 0 | 0 |
| K = 1 | 1 | 0 | the logit | 0 | 0 |
| K = 0 | empty | empty | -inf | NaN for a hard label, else 0 | empty |

The functions that optax has too pass optax's own tests in the place of its own. They differ on purpose where optax
gives NaN and there is a number:

- a label of 0 contributes 0 on a logit of -inf; so does a target of 0 in `kl_divergence`, and the side that the label
  does not take in `sigmoid_binary_cross_entropy` at ±inf;
- behind a mask of `convex_kl_divergence` too the gradient is 0, whatever stands there;
- a single logit of +inf is the one-hot limit, and several have equal shares (entmax: NaN);

and where a silent answer would be wrong:

- an integer label outside [0, K), -1 included, makes loss and gradient of its own example NaN (optax wraps -1 around);
- labels and targets broadcast to the logits, not the logits to them;
- losses of half-precision logits are float32;
- `convex_kl_divergence` is another name of `generalized_kl_divergence`, and does not warn.
"""

from jaxsoftmax.losses.binary import sigmoid_binary_cross_entropy, sigmoid_focal_loss
from jaxsoftmax.losses.cross_entropy import (
    natural_gradient_norm,
    safe_softmax_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
)
from jaxsoftmax.losses.divergences_of_logits import jensen_shannon_divergence, softmax_kl_divergence
from jaxsoftmax.losses.divergences_of_probabilities import (
    convex_kl_divergence,
    generalized_kl_divergence,
    kl_divergence,
    kl_divergence_with_log_targets,
)
from jaxsoftmax.losses.entmax_losses import entmax_loss, multiclass_sparsemax_loss, sparsemax_loss
from jaxsoftmax.losses.entropy_brier import brier_loss, softmax_entropy
from jaxsoftmax.losses.focal import focal_loss_with_integer_labels, poly_loss_cross_entropy
from jaxsoftmax.losses.hessian import Curvature, curvature_of, logits_fisher, logits_ggn, logits_hessian
from jaxsoftmax.losses.reduction import weighted_mean
from jaxsoftmax.losses.regression import huber_loss, l2_loss, log_cosh, squared_error, sum_squared_error
from jaxsoftmax.losses.softcap import softcap_logits

__all__ = [
    "Curvature",
    "brier_loss",
    "convex_kl_divergence",
    "curvature_of",
    "entmax_loss",
    "focal_loss_with_integer_labels",
    "generalized_kl_divergence",
    "huber_loss",
    "jensen_shannon_divergence",
    "kl_divergence",
    "kl_divergence_with_log_targets",
    "l2_loss",
    "log_cosh",
    "logits_fisher",
    "logits_ggn",
    "logits_hessian",
    "multiclass_sparsemax_loss",
    "natural_gradient_norm",
    "poly_loss_cross_entropy",
    "safe_softmax_cross_entropy",
    "sigmoid_binary_cross_entropy",
    "sigmoid_focal_loss",
    "softcap_logits",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "softmax_entropy",
    "softmax_kl_divergence",
    "sparsemax_loss",
    "squared_error",
    "sum_squared_error",
    "weighted_mean",
]
