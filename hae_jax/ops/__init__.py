"""Operations of the layers: convolution, normalisation, attention, each in the form for the device."""
