"""One package per paper: its LightningModule and the plain torch parts it is made of."""
