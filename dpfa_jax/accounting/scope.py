"""What each setup protects, and what it does not: the sentences beside every number."""

import dataclasses
import types
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Setup:
    """What one way of using the library promises.

    Attributes:
      what: the setup in a sentence.
      protected: what the guarantee covers.
      not_protected: what it does not, however small ε is.
    """

    what: str
    protected: tuple[str, ...]
    not_protected: tuple[str, ...]

    def __str__(self):
        lines = [self.what, "", "Protected:", *(f"  + {each}" for each in self.protected)]
        return "\n".join([*lines, "", "Not protected:", *(f"  - {x}" for x in self.not_protected)])


_NOT_PROTECTED = (
    "how many records there are, and every other shape",
    "the query: attention protects the memory that is read, not who asks",
    "the residual branch, log-sum-exp, attention weights or any un-noised sum that also leaves",
    "keys and values of deeper layers, where earlier attention has mixed the records",
    "gradients through a private call: they are not a release",
    "parameters (bounds, caps, clip norms, scales) that were taken from the private data",
    "a key used twice: the difference of two outputs cancels the noise",
    "averages of repeated calls beyond what the ledger charges for each of them",
    "choosing the best of several private runs after the fact",
)

SETUPS: Mapping[str, Setup] = types.MappingProxyType(
    {
        "memory": Setup(
            "Attention over a private memory, one fixed reference (S2), clipped contributions "
            "(S3) or Gaussian-process noise (S5).",
            ("each record's key and value, under the adjacency named", "against public queries"),
            (
                "records that were encoded together: each row may depend on one record only",
                "a person with several records, unless GROUP(rows) is charged",
                *_NOT_PROTECTED,
            ),
        ),
        "sequence": Setup(
            "Release of a whole clipped sequence with Gaussian noise (S7), the local model.",
            ("the whole input sequence, whatever it is replaced by",),
            ("its padded length", *_NOT_PROTECTED[2:]),
        ),
        "sampled": Setup(
            "Sampled attention: one public candidate drawn with softmax probability (S8).",
            ("one record's score, replaced within its bound",),
            (
                "the value of the chosen record, if values are private: never return it",
                "presence or absence of a record: the statement is for replacement",
                *_NOT_PROTECTED[4:],
            ),
        ),
        "training": Setup(
            "Training with clipped per-example gradients and Gaussian noise (DP-SGD).",
            ("each example's influence on everything computed from the noisy gradients",),
            (
                "a private memory read at inference time: private weights do not cover it",
                "an example that occurs in several rows, unless the group is what is sampled and "
                "clipped",
                "batches that are shuffled instead of sampled",
                "data used to choose hyper-parameters without being charged",
                "metrics, losses and norms reported without noise",
            ),
        ),
    }
)
"""The setups that the command line explains."""
