"""Mean and standard deviation of RGB pixels in [0, 1], by which models expect their input to be normalised."""

STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Value of the recipe's ``normalisation`` -> (mean, deviation) of red, green and blue."""
