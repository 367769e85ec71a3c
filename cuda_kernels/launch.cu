// All launchers of launch.h in one translation unit. The three files can also be compiled separately, in parallel.
#include "launch_attend.cu"
#include "launch_codec.cu"
#include "launch_store.cu"
