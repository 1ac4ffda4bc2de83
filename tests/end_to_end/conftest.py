from tests.training.conftest import make_data as make_data
