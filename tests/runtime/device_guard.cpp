/* A guard for CUDA devices that does nothing, for a torch that was built without CUDA: with it fake CUDA tensors can be subscripted,
 * copied and traced as on a machine with a GPU.  No tensor with memory is ever on that device. */
#include <c10/core/impl/DeviceGuardImplInterface.h>

C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
