"""The kernel that ends a product: sums of splits and experts, the stream, the norms."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formulas.norms import Norm, Onto
from pallas_kernels.triton.parts import Parts
from pallas_kernels.triton.step.add_norm import Experts, finish_rows
from tests.executed.bounds import DTYPES, Bounded, U
from tests.executed.work import Work

_EPS = 1e-5
_HELD = 6


@dataclasses.dataclass(frozen=True)
class AddNorm:
    """The end of one product.

    Attributes:
      splits: of K; 1 is a finished product in `dtype`.
      late, early: kinds of norms, "" for none.
      top_k: experts of a row, 0 for an ordinary product, which has a bias if it is split.
      shared: whether shared experts with a gate are added.
      factor: of what is added to the stream; 0 is none.
    """

    arch: str
    rows: int
    features: int
    dtype: str
    splits: int = 1
    late: str = ""
    early: str = "rounded"
    top_k: int = 0
    shared: bool = False
    factor: float = 0.0

    @property
    def kind(self) -> str:
        return "add and norm"

    def prepare(self) -> Work:
        """Normal numbers, and float64 with what rounding explains."""
        rng = np.random.default_rng(self.features)
        dtype = DTYPES[self.dtype]

        def draw(*shape: int, dtype=dtype) -> np.ndarray:
            return rng.normal(size=shape).astype(dtype)

        pairs = self.rows * max(self.top_k, 1)
        sums = draw(self.splits, pairs, self.features, dtype=np.float32)
        if self.splits == 1:
            sums = sums.astype(dtype)
        bias = draw(self.features) if self.splits > 1 and not self.top_k else None
        local = rng.integers(0, _HELD + 1, pairs).astype(np.int32) if self.top_k else None
        shared = (draw(self.rows, self.features), draw(self.rows, 1)) if self.shared else None
        weights = [draw(self.features) if kind else None for kind in (self.late, self.early)]
        residual = draw(self.rows, self.features)

        def run(sums, bias, local, shared, weights, residual, interpret=False):
            norms = (
                Norm(weight, _EPS, kind) if kind else None
                for weight, kind in zip(weights, (self.late, self.early), strict=True)
            )
            experts = Experts(local, _HELD, *(shared or ())) if self.top_k else None
            product, onto = Parts(sums, bias), Onto(residual, *norms, factor=self.factor or 1.0)
            found = finish_rows(product, onto, experts, interpret=interpret)
            return tuple(x for x in found if x is not None)

        arguments = sums, bias, local, shared, weights, residual
        stream = self._add(sums, bias, local, shared).round_to(dtype)
        if self.late:
            stream = stream.normalise(weights[0], _EPS, self.late, dtype)
        if self.factor:
            stream = stream.times(self.factor).round_to(dtype)
        stream = stream.add(residual.astype(np.float64)).round_to(dtype)
        expected = [stream]
        if self.early:
            expected.append(stream.normalise(weights[1], _EPS, self.early, dtype))
        arguments = jax.tree.map(jnp.asarray, arguments)
        return Work(run, arguments, tuple(expected), lambda output: output, False)

    def _add(self, sums, bias, local, shared) -> Bounded:
        terms = sums.astype(np.float64)
        if local is not None:
            terms = np.where((local < _HELD)[None, :, None], terms, 0.0)
        terms = terms.reshape(self.splits, self.rows, -1, self.features)
        value, size = terms.sum((0, 2)), np.abs(terms).sum((0, 2))
        roundings = self.splits + max(self.top_k, 1)
        if bias is not None:
            value, size = value + bias.astype(np.float64), size + np.abs(bias.astype(np.float64))
        if shared is not None:
            wide, gate = (x.astype(np.float64) for x in shared)
            added = wide / (1 + np.exp(-gate))
            # a sigmoid is an exponential, a sum and a quotient, two units each
            value, size, roundings = value + added, size + np.abs(added), roundings + 16
        return Bounded(value, (roundings + 1) * U * size)
