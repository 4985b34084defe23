// Programmatic dependent launch: what comes before `wait` may overlap the kernel before this one.
#pragma once

__device__ inline void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ inline void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;"); }
