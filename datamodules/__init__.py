"""One LightningDataModule per kind of data, reading the real data sets' own on-disk layouts."""
