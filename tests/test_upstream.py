"""diffusers' own test suites for schedulers and text-to-image pipelines, pointed at our classes.

They are not in its packages, so these run where a checkout of diffusers is at hand:

    DIFFUSERS_SOURCE=/path/to/diffusers python -m pytest tests/test_upstream.py

Left out, each with its reason, is what cannot apply to any pipeline or machine of this kind.
"""

import os
import sys
import tempfile
import unittest

import diffusers
import pytest
import tiny
import torch

from sfumato.pipelines import SfumatoPipeline
from sfumato.schedulers import SfumatoDDPMScheduler

SOURCE = os.environ.get("DIFFUSERS_SOURCE")
if not SOURCE:
    pytest.skip("set DIFFUSERS_SOURCE to a checkout of diffusers", allow_module_level=True)
sys.path.insert(0, SOURCE)

from tests.pipelines import pipeline_params, test_pipelines_common  # noqa: E402
from tests.schedulers import test_scheduler_ddpm  # noqa: E402


class TestScheduler(test_scheduler_ddpm.DDPMSchedulerTest):
    """The suite of `DDPMScheduler`, its figures included: `SchedulerCommonTest` and the tests of DDPM itself."""

    scheduler_classes = (SfumatoDDPMScheduler,)

    def test_rescale_betas_zero_snr(self):
        """Upstream predicts epsilon here, which is undefined at zero terminal SNR and which we refuse."""
        for rescale in (True, False):
            self.check_over_configs(rescale_betas_zero_snr=rescale, prediction_type="v_prediction")

    def test_from_pretrained(self):
        """Ours keeps `_use_default_values`, empty: without it, a swap in memory to DEIS or Heun loses what was trained."""
        (cls,), config = self.scheduler_classes, self.get_scheduler_config()
        scheduler = cls(**config)
        with tempfile.TemporaryDirectory() as folder:
            scheduler.save_pretrained(folder)
            assert cls.from_pretrained(folder).config == scheduler.config


class Pipeline(SfumatoPipeline):
    """Ours opens no pickles, which these tests write for speed; here they write safetensors."""

    def save_pretrained(self, folder, safe_serialization=True, **kwargs):
        super().save_pretrained(folder, **kwargs)


class TestPipeline(
    test_pipelines_common.PipelineLatentTesterMixin,
    test_pipelines_common.PipelineKarrasSchedulerTesterMixin,
    test_pipelines_common.SDFunctionTesterMixin,
    test_pipelines_common.PipelineTesterMixin,
    unittest.TestCase,
):
    pipeline_class = Pipeline
    params = pipeline_params.TEXT_TO_IMAGE_PARAMS - {"cross_attention_kwargs"}
    batch_params = pipeline_params.TEXT_TO_IMAGE_BATCH_PARAMS
    image_params = image_latents_params = pipeline_params.TEXT_TO_IMAGE_IMAGE_PARAMS
    callback_cfg_params = pipeline_params.TEXT_TO_IMAGE_CALLBACK_CFG_PARAMS

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path, monkeypatch):
        self.folder = tmp_path
        monkeypatch.setattr(diffusers.pipelines, "Pipeline", Pipeline, raising=False)  # where one test looks it up

    def test_save_load_optional_components(self):
        """All stay None but the guider, which comes last: none given means the default one."""
        with self.assertRaisesRegex(AssertionError, "`guider` did not stay set to None"):
            super().test_save_load_optional_components()

    def get_dummy_components(self, **ignored):
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=4,
            norm_num_groups=2,
        )
        vae.save_pretrained(self.folder / "vae")
        return dict(
            tiny.pipeline(self.folder, vae={"pretrained": str(self.folder / "vae")}, data={"resolution": 32}).components
        )

    def get_dummy_inputs(self, device, seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        return {"prompt": "a red circle", "generator": generator, "num_inference_steps": 2, "output_type": "np"}
