"""ComfyUI nodes, one module per group."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .attention import FateZeroSpatioTemporalAttention
from .attention_maps import FateZeroAttentionMaps
from .demo import FateZeroDemoModel, FateZeroDemoVideoModel
from .edit import FateZeroSampler
from .edit_maps import FateZeroEditMaps, FateZeroSlice
from .evaluate import FateZeroCompareVideos, FateZeroEvaluate
from .flow_edit import FateZeroFlowEdit
from .flow_mask_preview import FateZeroFlowMaskPreview
from .flow_smoothing import FateZeroFlowSmoothing, FateZeroSteady
from .guides import FateZeroEditGuides
from .inversion import FateZeroInvert, FateZeroLoadStore, FateZeroReconstructionCheck, FateZeroSaveStore
from .layout import FateZeroLayout, FateZeroLayoutGuider
from .mask_preview import FateZeroMaskPreview
from .methods import SETTINGS_NODES
from .model_pair import FateZeroWanPair
from .prompt import FateZeroPromptEdit
from .region import FateZeroCropToMask, FateZeroStitchBack
from .restore import FateZeroRestoreUnchanged
from .sampling import (
    FateZeroDDIM,
    FateZeroEditGuider,
    FateZeroInvertGuider,
    FateZeroSigmas,
    FateZeroStoreOfInversion,
)
from .tune_a_video import FateZeroLoadTemporalLayers, FateZeroTuneOnVideo
from .video import FateZeroEncodeVideo, FateZeroLoadVideo


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
            *SETTINGS_NODES,
            FateZeroFlowSmoothing,
            FateZeroSteady,
            FateZeroLayout,
            FateZeroLayoutGuider,
            FateZeroAttentionMaps,
            FateZeroLoadTemporalLayers,
            FateZeroTuneOnVideo,
            FateZeroMaskPreview,
            FateZeroEditMaps,
            FateZeroFlowMaskPreview,
            FateZeroRestoreUnchanged,
            FateZeroCropToMask,
            FateZeroStitchBack,
            FateZeroReconstructionCheck,
            FateZeroSaveStore,
            FateZeroLoadStore,
            FateZeroSpatioTemporalAttention,
            FateZeroWanPair,
            FateZeroEditGuides,
            FateZeroSigmas,
            FateZeroDDIM,
            FateZeroInvertGuider,
            FateZeroStoreOfInversion,
            FateZeroEditGuider,
            FateZeroEvaluate,
            FateZeroCompareVideos,
            FateZeroSlice,
            FateZeroDemoModel,
            FateZeroDemoVideoModel,
        ]
