"""ComfyUI nodes, one module per group."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .attention import FateZeroSpatioTemporalAttention
from .demo import FateZeroDemoModel, FateZeroDemoVideoModel
from .edit import FateZeroMaskPreview, FateZeroSampler
from .evaluate import FateZeroCompareVideos, FateZeroEvaluate
from .fatezero import FateZeroFusion
from .flow_edit import FateZeroFlowEdit
from .flow_smoothing import FateZeroFlowSmoothing, FateZeroSteady
from .inversion import FateZeroInvert, FateZeroLoadStore, FateZeroReconstructionCheck, FateZeroSaveStore
from .layout import FateZeroLayout, FateZeroLayoutGuider
from .plug_and_play import FateZeroPnP
from .prompt import FateZeroPromptEdit
from .sampling import (
    FateZeroDDIM,
    FateZeroEditGuider,
    FateZeroInvertGuider,
    FateZeroSigmas,
    FateZeroStoreOfInversion,
)
from .tokenflow import FateZeroTokenFlow
from .tune_a_video import FateZeroLoadTemporalLayers, FateZeroTuneOnVideo
from .video import FateZeroEncodeVideo, FateZeroLoadVideo
from .wan import FateZeroWanPair


class FateZeroExtension(ComfyExtension):
    """The nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            FateZeroLoadVideo,
            FateZeroEncodeVideo,
            FateZeroPromptEdit,
            FateZeroInvert,
            FateZeroFlowEdit,
            FateZeroSampler,
            FateZeroFusion,
            FateZeroPnP,
            FateZeroTokenFlow,
            FateZeroFlowSmoothing,
            FateZeroSteady,
            FateZeroLayout,
            FateZeroLayoutGuider,
            FateZeroLoadTemporalLayers,
            FateZeroTuneOnVideo,
            FateZeroMaskPreview,
            FateZeroReconstructionCheck,
            FateZeroSaveStore,
            FateZeroLoadStore,
            FateZeroSpatioTemporalAttention,
            FateZeroWanPair,
            FateZeroSigmas,
            FateZeroDDIM,
            FateZeroInvertGuider,
            FateZeroStoreOfInversion,
            FateZeroEditGuider,
            FateZeroEvaluate,
            FateZeroCompareVideos,
            FateZeroDemoModel,
            FateZeroDemoVideoModel,
        ]
