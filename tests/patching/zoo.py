"""All tiny models of the zoo."""

from zoo_controlnet import ZOO_CONTROLNET
from zoo_image import ZOO_IMAGE
from zoo_unet import ZOO_UNET
from zoo_video import ZOO_VIDEO

ZOO = (*ZOO_IMAGE, *ZOO_VIDEO, *ZOO_UNET, *ZOO_CONTROLNET)
