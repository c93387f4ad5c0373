"""The two small trained models that ship with Quasar, and the texts to calibrate and measure them on."""
