"""Names of samplers and schedulers; a few of them."""


class KSampler:
    SAMPLERS = ["euler", "dpmpp_2m", "ddim"]
    SCHEDULERS = ["simple", "normal", "karras"]
