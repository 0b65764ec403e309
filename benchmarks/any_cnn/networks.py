"""The networks of the scoreboard: every torchvision constructor of three kinds, and timm names of many families."""

from __future__ import annotations

from fnmatch import fnmatch
from types import ModuleType

TORCHVISION = ("classification", "segmentation", "detection")

# What other pruners were tried on, and what they fail on: split, shuffle, groups, weights made in forward.
TIMM_KNOWN = """
resnet18 vit_tiny_patch16_224 convnext_atto res2net50_26w_4s hrnet_w18_small ghostnet_100 repvgg_a0 dla34 cspresnet50
efficientformer_l1 mobilevit_xs tf_efficientnet_b0 nfnet_f0 mixnet_s skresnet18 rexnet_100 seresnet18 seresnext26d_32x4d
resnest14d inception_resnet_v2 xception41 ese_vovnet19b_dw selecsls42 gernet_s levit_128s coatnet_nano_rw_224
poolformer_s12 convnextv2_atto fastvit_t8 mobileone_s0 mobilenetv4_conv_small tinynet_a lcnet_050 fbnetc_100 darknet53
cspdarknet53 dpn68 ecaresnet26t regnetz_b16 repghostnet_050 inception_next_atto edgenext_xx_small resnetv2_50
mobilenetv3_small_100 starnet_s1 mambaout_femto pvt_v2_b0 tresnet_m res2next50 repvit_m0_9 efficientvit_b0
hardcorenas_a nf_resnet26 swin_tiny_patch4_window7_224 mixer_s32_224 deit_tiny_patch16_224
""".split()

# Further families, one or two of each.
TIMM_MORE = """
resnet10t resnetaa50 resnetblur50 gcresnext26ts legacy_seresnet18 legacy_xception semnasnet_075 spnasnet_100
mobilenetv1_100 mobilenetv2_100 mobilenet_edgetpu_v2_xs efficientnet_lite0 efficientnet_b0_gn tf_efficientnetv2_b0
regnetv_040 inception_v4 ghostnetv2_100 ghostnetv3_100 fasternet_t0 hgnet_tiny hgnetv2_b0 rdnet_tiny cs3darknet_s
vovnet39a nf_regnet_b0 eca_nfnet_l0 skresnext50_32x4d dpn68b convmixer_768_32 senet154 pnasnet5large
resnet50_gn botnet26t_256 halonet26t lambda_resnet26t sebotnet33ts_256 bat_resnext26ts nextvit_small tiny_vit_5m_224
resmlp_12_224 visformer_tiny focalnet_tiny_srf davit_tiny mobilevitv2_050 swiftformer_xs shvit_s1 efficientvit_m0
mobilenetv4_hybrid_medium convformer_s18 caformer_s18 xcit_nano_12_p16_224 pit_ti_224 hiera_tiny_224 twins_pcpvt_small
""".split()


def all_networks() -> list[str]:
    """`torchvision/KIND:NAME` and `timm:NAME`, in the order of the table."""
    from torchvision.models import list_models

    found = [f"torchvision/{kind}:{name}" for kind in TORCHVISION for name in sorted(list_models(module=_module(kind)))]
    return found + [f"timm:{name}" for name in (*TIMM_KNOWN, *TIMM_MORE)]


def chosen(names: list[str], only: str | None) -> list[str]:
    """Those that match a glob, with or without the part before the colon."""
    return [n for n in names if only is None or fnmatch(n, only) or fnmatch(n.partition(":")[2], only)]


def _module(kind: str) -> ModuleType:
    import torchvision.models as models

    return models if kind == "classification" else getattr(models, kind)
