"""UltraFeedback as a TFDS dataset of triplets.

    config = tfds.download.DownloadConfig(manual_dir=FOLDER)
    UltraFeedback().download_and_prepare(download_config=config)

prepares it from the public files in a folder; FEEDBACK_FILE = "tfds:ultra_feedback" then reads it. This needs
no `tfds` command, which wants Apache Beam.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from dro_jax.data.records import read_records
from dro_jax.data.ultrafeedback import flatten, is_record
from dro_jax.errors import UsageError


class UltraFeedback(tfds.core.GeneratorBasedBuilder):
    """Four rated completions a prompt, each an example {prompt, completion, reward, model} of its own."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012
    # TFDS looks for it with a package that it does not require.
    code_path = epath.Path(__file__)
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put UltraFeedback's files, all *.jsonl or all *.parquet, into the manual directory."
    )
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(
            name="fine_grained", description="The reward is the mean of the four aspects' ratings."
        ),
        tfds.core.BuilderConfig(
            name="overall",
            description="The reward is overall_score, wrong in some rows of the first release.",
        ),
    ]

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description="UltraFeedback (arXiv 2310.01377), a completion an example; those that nobody rated "
            "are left out. No split is held out: dro_jax makes its own, by prompt.",
            features=tfds.features.FeaturesDict(
                {
                    "prompt": tfds.features.Text(),
                    "completion": tfds.features.Text(),
                    # As a number it would be stored in 32 bits.
                    "reward": tfds.features.Tensor(shape=(), dtype=np.float64, encoding="bytes"),
                    "model": tfds.features.Text(),
                }
            ),
            homepage="https://arxiv.org/abs/2310.01377",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(epath.Path(dl_manager.manual_dir))}

    def _generate_examples(self, folder: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
        files = sorted([*folder.glob("*.jsonl"), *folder.glob("*.parquet")])
        if len({file.suffix for file in files}) != 1:
            # Those of both kinds would be the same records twice.
            raise UsageError(f"{folder}: put all *.jsonl or all *.parquet into it")
        for file in files:
            for record in read_records(str(file)):
                if record.problem or not is_record(record.fields):
                    problem = record.problem or "has no fields 'instruction' and 'completions'"
                    raise UsageError(f"{record.where}: {problem}")
                for number, row in enumerate(flatten(record.fields, self.builder_config.name), 1):
                    if row["reward"] is None:
                        continue
                    kinds = {"prompt": str, "completion": str, "reward": int | float}
                    if not all(isinstance(row[name], kind) for name, kind in kinds.items()):
                        raise UsageError(
                            f"{record.where}, completion {number}: prompt or response is no text, or the "
                            "score no number; `dro_jax check` says more"
                        )
                    yield f"{file.name}:{record.line}:{number}", row | {"model": row["model"] or ""}
