// prelude.h stands in for this header of MLX.
#pragma once
