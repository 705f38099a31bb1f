from tests.experiment.conftest import data_dir as data_dir
