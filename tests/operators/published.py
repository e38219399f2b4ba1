"""Windows of FLUX, Cosmos-7B and HunyuanVideo that Generalized Neighborhood Attention was published with."""

FLUX = ((256, 256), (16, 16), (16, 8))
COSMOS = ((16, 44, 80), (8, 4, 8), (4, 4, 8))
HUNYUAN = ((30, 48, 80), (4, 8, 8), (2, 8, 8))
FLUX_TIME = (0.518, 28, 9)
COSMOS_TIME = (0.587, 35, 12)
HUNYUAN_TIME = (0.6066, 50, 15)  # printed as 60.7 %, which one entry more contradicts

# Window, stride, tiles visited by the busiest query tile, and the printed speed-ups of the whole model by simulation:
# all steps, and with the first ones dense (arXiv 2504.16922, tables of section 4.3).
PUBLISHED = [
    (FLUX, FLUX_TIME, (80, 80), (1, 1), 84, 1.76, 1.42),
    (FLUX, FLUX_TIME, (80, 80), (16, 1), 60, 1.84, 1.45),
    (FLUX, FLUX_TIME, (80, 80), (16, 16), 50, 1.88, 1.46),
    (COSMOS, COSMOS_TIME, (16, 32, 48), (1, 1, 1), 252, 1.35, 1.21),
    (COSMOS, COSMOS_TIME, (16, 32, 48), (1, 8, 1), 224, 1.42, 1.24),
    (COSMOS, COSMOS_TIME, (16, 32, 48), (1, 1, 16), 216, 1.42, 1.24),
    (COSMOS, COSMOS_TIME, (16, 32, 48), (1, 8, 16), 192, 1.50, 1.28),
    (COSMOS, COSMOS_TIME, (16, 24, 16), (1, 1, 1), 84, 1.90, 1.45),
    (COSMOS, COSMOS_TIME, (16, 24, 16), (1, 8, 1), 72, 1.96, 1.48),
    (COSMOS, COSMOS_TIME, (16, 24, 16), (1, 1, 16), 56, 2.05, 1.51),
    (COSMOS, COSMOS_TIME, (16, 24, 16), (1, 8, 16), 48, 2.10, 1.52),
    (HUNYUAN, HUNYUAN_TIME, (30, 40, 40), (1, 1, 1), 630, 1.21, 1.14),
    (HUNYUAN, HUNYUAN_TIME, (30, 40, 40), (1, 1, 8), 450, 1.44, 1.27),
    (HUNYUAN, HUNYUAN_TIME, (30, 40, 40), (1, 32, 8), 375, 1.55, 1.33),
    (HUNYUAN, HUNYUAN_TIME, (18, 24, 24), (1, 1, 1), 275, 1.73, 1.42),
    (HUNYUAN, HUNYUAN_TIME, (18, 24, 24), (2, 1, 1), 250, 1.78, 1.44),
    (HUNYUAN, HUNYUAN_TIME, (18, 24, 24), (1, 1, 8), 165, 1.99, 1.53),
    (HUNYUAN, HUNYUAN_TIME, (18, 24, 24), (2, 1, 8), 150, 2.02, 1.55),
    (HUNYUAN, HUNYUAN_TIME, (18, 24, 24), (1, 8, 8), 99, 2.17, 1.61),
    (HUNYUAN, HUNYUAN_TIME, (18, 24, 24), (2, 8, 8), 90, 2.20, 1.62),
    (HUNYUAN, HUNYUAN_TIME, (18, 24, 24), (16, 8, 8), 81, 2.23, 1.63),
]
