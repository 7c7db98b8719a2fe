"""What layers compute with: convolution, normalisation, attention, in the form that suits the device."""
