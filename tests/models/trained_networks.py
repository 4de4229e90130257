"""Networks of every kind that `models` has, small, with norms as after training."""

import torch
from torch import nn

NETWORKS = [
    ("vgg:width=2,dense=4,patch=2", "kaf_silu"),
    ("vgg:width=2,dense=4,pool=average,patch=2", "elu"),
    ("light:width=2,dense=4,pool=stride,patch=2", "pssilu"),
    ("resnet20:width=2,patch=4", "kaf_free"),
    ("resnet20:width=2,patch=4,form=post,shortcut=conv", "prelu"),
    ("resnet20:width=2,patch=4,form=post_norm,shortcut=conv3x3", "gelu"),
    ("preactresnet18:width=2,patch=2", "smoothrelu"),
    ("wideresnet:depth=10,width=1,patch=4", "softplus"),
    ("vgg:width=2,dense=4,patch=2", "kwta:ratio=0.3"),
    ("vgg:width=2,dense=4,patch=2", "kwta:ratio=0.3,per=channel"),
    ("resnet20:width=2,patch=4", "kaf:base=silu"),
    ("vgg:width=2,dense=4,patch=2", "kaf_free:base=relu"),
]


def trained_like(model: nn.Module) -> nn.Module:
    """Give every norm statistics and weights that it could have after training, every third weight a negative one."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.3, 0.3),
            ):
                tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))
            module.weight.data[::3] *= -1
    return model.eval()
