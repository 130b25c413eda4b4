// An accelerator that computes on the CPU: tensors of another device type, with memory, kernels and generator.
//
// Every operator that has no kernel of its own for the device comes to `compute`. It hands the CPU's kernel tensors of
// the CPU that lie in the same memory, and hands back what it returns as tensors of the device. So the numbers are the
// CPU's, bit by bit, and nothing is copied.
//
// The device is torch's "mps" or "cuda", or PrivateUse1, which a program may give any name: `become` says which.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace {

using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::IValue, c10::Storage, c10::StorageImpl, c10::TensorImpl;

DeviceType our_type = DeviceType::PrivateUse1;
c10::DispatchKey our_key = c10::DispatchKey::PrivateUse1;
Device our_device(our_type, 0);

// Operators that take tensors of the CPU beside those of the device.
const std::set<std::string> may_mix = {
    "aten::copy_",      "aten::_copy_from",       "aten::index.Tensor",         "aten::index.Tensor_out",
    "aten::index_put_", "aten::_index_put_impl_", "aten::_pack_padded_sequence"};

// What the device refuses, as the Python module says; the words are its, too.
std::set<std::string> without_kernel;
std::string words_without_kernel, words_of_float64, words_of_faults;
bool has_float64 = true, has_faults = false, parameters_stay = true;

// ---------------------------------------------------------------------------------------------------------- memory

// How much the device holds, and can hold (0: no limit).
struct Held {
  std::mutex mutex;
  c10::CachingDeviceAllocator::DeviceStats stats;
  size_t limit = 0;

  void take(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    auto& now = stats.allocated_bytes[0];
    if (limit && now.current + bytes > limit) {
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes (emulated).");
    }
    now.increase(bytes);
  }

  void release(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    stats.allocated_bytes[0].decrease(bytes);
  }
};
Held& held() {
  static auto* held = new Held;  // tensors are freed after the statics
  return *held;
}

// Memory of the device: something of the CPU that owns it (a DataPtr, a Storage), and its size.
template <typename Owner>
c10::DataPtr held_by(Owner owner, void* data, size_t bytes) {
  struct Kept {
    Owner owner;
    size_t bytes;
    ~Kept() { held().release(bytes); }
  };
  held().take(bytes);
  auto* kept = new Kept{std::move(owner), bytes};
  return {data, kept, [](void* kept) { delete static_cast<Kept*>(kept); }, our_device};
}

struct Memory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto of_cpu = c10::GetAllocator(DeviceType::CPU)->allocate(bytes);
    auto* data = of_cpu.get();
    return held_by(std::move(of_cpu), data, bytes);
  }
  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex) override {
    std::lock_guard<std::mutex> lock(held().mutex);
    return held().stats;
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex) override {}
};
Memory memory;

// The memory of a CPU's storage, kept as long as the device needs it.
c10::DataPtr keep(const Storage& of_cpu) { return held_by(Storage(of_cpu), of_cpu.mutable_data(), of_cpu.nbytes()); }

// --------------------------------------------------------------------------------------------- one device, one stream

c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, our_device); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return our_type; }
  Device exchangeDevice(Device) const override { return our_device; }
  Device getDevice() const override { return our_device; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return stream(); }
  c10::Stream getDefaultStream(Device) const override { return stream(); }
  c10::Stream getNewStream(Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
};

// ------------------------------------------------------------------------------------------------------- the generator

struct Generator final : at::CPUGeneratorImpl {
  Generator() {
    device_ = our_device;
    key_set_ = c10::DispatchKeySet(our_key);
  }
};

const at::Generator& default_generator() {
  static auto generator = at::make_generator<Generator>();
  return generator;
}

// Kernels of the CPU draw from its own generator: for one call it stands where the device's does.
struct Drawing {
  explicit Drawing(const at::Generator& drawn) : of_device(drawn.defined() ? drawn : default_generator()) {
    before = of_cpu.get_state();
    of_cpu.set_state(of_device.get_state());
  }
  ~Drawing() {
    of_device.set_state(of_cpu.get_state());
    of_cpu.set_state(before);
  }
  at::Generator of_cpu = at::detail::getDefaultCPUGenerator(), of_device;
  at::Tensor before;
};

template <typename Interface>
struct Hooks : Interface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(DeviceType::CPU); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::make_generator<Generator>(); }
  Device getDeviceFromPtr(void*) const override { return our_device; }
};

struct MPSHooks final : Hooks<at::MPSHooksInterface> {
  bool hasMPS() const override { return true; }
  bool isOnMacOSorNewer(unsigned, unsigned) const override { return true; }
  c10::Allocator* getMPSDeviceAllocator() const override { return &memory; }
  void deviceSynchronize() const override {}
  void emptyCache() const override {}
};

struct CUDAHooks final : Hooks<at::CUDAHooksInterface> {
  bool hasCUDA() const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &memory; }
  void deviceSynchronize(DeviceIndex) const override {}
};

struct OtherHooks final : Hooks<at::PrivateUse1HooksInterface> {
  void resizePrivateUse1Bytes(const Storage& storage, size_t bytes) const override {
    auto larger = memory.allocate(bytes);
    memory.copy_data(larger.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(larger));
    storage.set_nbytes(bytes);
  }
};

// ---------------------------------------------------------------------------------------------------------- one call

void refuse_float64(c10::ScalarType type) {
  if (!has_float64 && (type == c10::ScalarType::Double || type == c10::ScalarType::ComplexDouble)) {
    TORCH_CHECK_TYPE(false, words_of_float64);
  }
}

at::Tensor with_form_of(at::Tensor tensor, const at::Tensor& like) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  impl->_set_conj(like.is_conj());
  impl->_set_neg(like.is_neg());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return tensor;
}

at::Tensor tensor_in(const Storage& storage, c10::DispatchKey key, const at::Tensor& like) {
  c10::DispatchKeySet keys(key);
  return with_form_of(at::detail::make_tensor<TensorImpl>(Storage(storage), keys, like.dtype()), like);
}

// In inference mode, too, a view of an ordinary tensor is one: its keys are those of its base.
at::Tensor view_of(const at::Tensor& base, const at::Tensor& like) {
  auto storage = base.storage();
  return with_form_of(
      at::detail::make_tensor<TensorImpl>(TensorImpl::VIEW, std::move(storage), base.key_set(), like.dtype()), like);
}

// The two sides of one call: which storage and which tensor of the CPU stands for which of the device.
class Sides {
 public:
  Storage to_cpu(const Storage& of_device) {
    for (const auto& [of_cpu, other] : storages_) {
      if (other.is_alias_of(of_device)) return of_cpu;
    }
    c10::DataPtr same_memory(of_device.mutable_data(), Device(DeviceType::CPU));
    storages_.emplace_back(
        c10::make_intrusive<StorageImpl>(StorageImpl::use_byte_size_t(), of_device.nbytes(), std::move(same_memory),
                                         c10::GetAllocator(DeviceType::CPU), true),
        of_device);
    return storages_.back().first;
  }

  Storage to_device(const Storage& of_cpu) {
    for (const auto& [other, of_device] : storages_) {
      if (other.is_alias_of(of_cpu)) return of_device;
    }
    storages_.emplace_back(of_cpu, c10::make_intrusive<StorageImpl>(StorageImpl::use_byte_size_t(), of_cpu.nbytes(),
                                                                    keep(of_cpu), &memory, true));
    return storages_.back().second;
  }

  at::Tensor to_cpu(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    auto of_cpu = tensor;
    if (tensor.device().type() == our_type) {
      of_cpu = tensor_in(to_cpu(tensor.storage()), c10::DispatchKey::CPU, tensor);
    }
    tensors_.emplace_back(of_cpu, tensor);
    return of_cpu;
  }

  at::Tensor to_device(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    for (const auto& [of_cpu, given] : tensors_) {
      if (of_cpu.is_same(tensor)) return given;
    }
    refuse_float64(tensor.scalar_type());
    for (const auto& [of_cpu, given] : tensors_) {
      if (!of_cpu.is_same(given) && of_cpu.storage().is_alias_of(tensor.storage())) return view_of(given, tensor);
    }
    return tensor_in(to_device(tensor.storage()), our_key, tensor);
  }

  // An operator may have given a tensor other memory (resize_), or another form (out=, set_).
  void settle() {
    for (const auto& [of_cpu, of_device] : storages_) {
      if (of_cpu.data() != of_device.data()) {
        of_device.set_data_ptr_noswap(keep(of_cpu));
        of_device.set_nbytes(of_cpu.nbytes());
      }
    }
    for (const auto& [of_cpu, given] : tensors_) {
      if (of_cpu.is_same(given)) continue;
      auto* impl = given.unsafeGetTensorImpl();
      auto storage = to_device(of_cpu.storage());
      if (!storage.is_alias_of(given.storage())) impl->set_storage_keep_dtype(storage);
      if (of_cpu.sizes() != given.sizes() || of_cpu.strides() != given.strides() ||
          of_cpu.storage_offset() != given.storage_offset()) {
        impl->set_sizes_and_strides(of_cpu.sizes(), of_cpu.strides(), of_cpu.storage_offset());
      }
    }
  }

 private:
  std::vector<std::pair<Storage, Storage>> storages_;       // of the CPU, of the device
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;  // of the CPU, as it was given
};

template <typename Change>
void change_tensors(IValue& value, Change change) {
  if (value.isTensor()) {
    value = change(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<at::Tensor> changed;
    for (const at::Tensor& tensor : value.toTensorVector()) changed.push_back(change(tensor));
    value = std::move(changed);
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> changed;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
      changed.push_back(tensor ? std::optional(change(*tensor)) : std::nullopt);
    }
    value = std::move(changed);
  }
}

// Raises where MPS would compute something else, and say nothing: see FAULTS in the Python module.
void refuse_faults(const std::string& name, c10::ArrayRef<IValue> arguments) {
  auto is_here = [](const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == our_type; };
  if (name == "aten::copy_") {
    const auto &target = arguments[0].toTensor(), &source = arguments[1].toTensor();
    bool leaves = is_here(source) && !is_here(target), comes = is_here(target) && !is_here(source);
    TORCH_CHECK(!(leaves && target.dtype() != source.dtype() && source.storage_offset()), words_of_faults, "cast");
    TORCH_CHECK(!((leaves || comes) && arguments[2].toBool()), words_of_faults, "non_blocking");
    return;
  }
  bool is_mixed = false;
  for (const auto& value : arguments) is_mixed |= value.isTensor() && is_here(value.toTensor());
  for (const auto& value : arguments) {
    if (!is_mixed || !value.isTensor() || !value.toTensor().defined() || is_here(value.toTensor())) continue;
    TORCH_CHECK(!(value.toTensor().dim() == 0 && value.toTensor().storage_offset()), words_of_faults, "scalar");
  }
  if (name == "aten::mm.out" || name == "aten::bmm.out" || name == "aten::addmm.out" || name == "aten::baddbmm.out") {
    const auto& right = arguments[name.find("add") == std::string::npos ? 1 : 2].toTensor();
    const auto& left = arguments[name.find("add") == std::string::npos ? 0 : 1].toTensor();
    bool is_large = right.size(-2) >= 32767 && left.size(-2) >= 16 && right.size(-1) >= 16;
    TORCH_CHECK(!is_large, words_of_faults, "matmul");
  }
}

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  auto name = schema.overload_name().empty() ? schema.name() : schema.name() + "." + schema.overload_name();
  TORCH_CHECK_NOT_IMPLEMENTED(!without_kernel.count(name), "The operator '", name, "' ", words_without_kernel);
  auto arguments = torch::jit::last(*stack, schema.arguments().size());
  if (has_faults) refuse_faults(name, arguments);
  TORCH_CHECK_INDEX(name.rfind("aten::index.", 0) || arguments[0].toTensor().device().type() == our_type,
                    "indices should be either on cpu or on the same device as the indexed tensor (cpu)");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  Sides sides;
  at::Generator drawn;
  bool has_ours = false, has_others = false;
  auto first = stack->end() - static_cast<std::ptrdiff_t>(schema.arguments().size());
  for (auto value = first; value != stack->end(); ++value) {
    change_tensors(*value, [&](const at::Tensor& tensor) {
      bool is_ours = tensor.defined() && tensor.device().type() == our_type;
      has_ours |= is_ours;
      has_others |= tensor.defined() && !is_ours && tensor.dim() > 0;  // a single number may come from the CPU
      return sides.to_cpu(tensor);
    });
    if (value->isStorage() && value->toStorage().device_type() == our_type) *value = sides.to_cpu(value->toStorage());
    if (value->isDevice() && value->toDevice().type() == our_type) *value = Device(DeviceType::CPU);
    bool is_generator_of_cpu = value->isGenerator() && value->toGenerator().device().type() != our_type;
    TORCH_CHECK(our_type != DeviceType::CUDA || !is_generator_of_cpu,
                "Expected a 'cuda' device type for generator but found 'cpu'");
    if (value->isGenerator() && value->toGenerator().device().type() == our_type) {
      drawn = value->toGenerator();
      *value = IValue();
    }
  }
  TORCH_CHECK(!(has_ours && has_others) || may_mix.count(name), "Expected all tensors to be on the same device, but ",
              "found at least two devices, ", our_device, " and cpu! (", name, ")");
  {
    std::unique_ptr<Drawing> drawing;
    if (op.hasTag(at::Tag::nondeterministic_seeded)) drawing = std::make_unique<Drawing>(drawn);
    try {
      op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    } catch (const c10::Error& error) {
      if (std::strstr(error.what(), "DefaultCPUAllocator") == nullptr) throw;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. (emulated: the CPU is)");
    }
  }
  sides.settle();
  auto first_result = stack->end() - static_cast<std::ptrdiff_t>(schema.returns().size());
  for (auto value = first_result; value != stack->end(); ++value) {
    change_tensors(*value, [&](const at::Tensor& tensor) { return sides.to_device(tensor); });
  }
}

// torch chooses between its kernels by a table that lists the devices it was built for: here, always the plain one.
at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const std::optional<at::Tensor>& mask, double dropout, bool is_causal, std::optional<double> scale,
                     bool enable_gqa) {
  auto dtype = query.scalar_type();  // fused kernels of CUDA sum in fp32
  if (our_type == DeviceType::CUDA && (dtype == c10::ScalarType::Half || dtype == c10::ScalarType::BFloat16)) {
    auto wide = [](const at::Tensor& tensor) { return tensor.to(c10::ScalarType::Float); };
    auto of_mask = mask && mask->scalar_type() != c10::ScalarType::Bool ? std::optional(wide(*mask)) : mask;
    return attention(wide(query), wide(key), wide(value), of_mask, dropout, is_causal, scale, enable_gqa)
        .to(dtype);
  }
  auto added = mask;
  if (mask && mask->scalar_type() == c10::ScalarType::Bool) {
    added = at::zeros_like(*mask, query.options()).masked_fill_(mask->logical_not(), -INFINITY);
  }
  return std::get<0>(at::_scaled_dot_product_attention_math(query, key, value, added, dropout, is_causal, std::nullopt,
                                                            scale, enable_gqa));
}

// Whether a parameter stays itself where its module moves (`parameter.data = ...`), so that an optimiser made before
// the move still has it. torch says no for devices that it does not know, and expects them to override this.
bool stays_itself(const at::Tensor& self, const at::Tensor& from) {
  auto is_known = [](Device device) { return device.is_cpu() || device.type() == our_type; };
  return parameters_stay && is_known(self.device()) && is_known(from.device());
}

// On CUDA torch has softmax itself widen fp16 to fp32, which the CPU's kernels do not.
using Softmax = at::Tensor& (*)(at::Tensor&, const at::Tensor&, int64_t, bool);
using SoftmaxBackward = at::Tensor& (*)(at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, c10::ScalarType);

template <Softmax softmax>
at::Tensor widened(const at::Tensor& self, int64_t dim, bool half_to_float) {
  auto input = half_to_float ? self.to(c10::ScalarType::Float) : self;
  auto result = at::empty({0}, input.options());
  return softmax(result, input, dim, false);
}

template <SoftmaxBackward softmax>
at::Tensor widened_backward(const at::Tensor& gradient, const at::Tensor& output, int64_t dim, c10::ScalarType type) {
  auto result = at::empty({0}, gradient.options());
  return softmax(result, gradient, output, dim, gradient.scalar_type()).to(type);
}

// A build of torch for the CPU has two answers compiled in: no accelerator, and hooks that raise. The hooks have no
// fields, so that another table of functions makes others of them; the first function is overwritten with a jump.
template <typename Interface, typename Ours>
void exchange_hooks(const Interface& hooks, const Ours* ours) {
  std::memcpy(const_cast<void*>(static_cast<const void*>(&hooks)), ours, sizeof(void*));
}

std::optional<DeviceType> accelerator(bool) { return our_type; }

template <typename Function>
void overwrite(Function* function, Function* other) {
  unsigned char jump[16];
  auto to = reinterpret_cast<uint64_t>(other);
#if defined(__x86_64__)
  const unsigned char code[] = {0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xe0};  // mov rax, to; jmp rax
  constexpr size_t place = 2;
#elif defined(__aarch64__)
  const unsigned char code[] = {0x50, 0, 0, 0x58, 0, 0x02, 0x1f, 0xd6, 0, 0, 0, 0, 0, 0, 0, 0};  // ldr x16, to; br x16
  constexpr size_t place = 8;
#else
#error "a jump for this processor is missing"
#endif
  std::memcpy(jump, code, sizeof(code));
  std::memcpy(jump + place, &to, sizeof(to));
  auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  auto start = reinterpret_cast<uintptr_t>(function) / page * page;
  auto end = reinterpret_cast<uintptr_t>(function) + sizeof(code);
  auto* pages = reinterpret_cast<void*>(start);
  TORCH_CHECK(!mprotect(pages, end - start, PROT_READ | PROT_WRITE | PROT_EXEC), "mprotect: ", std::strerror(errno));
  std::memcpy(reinterpret_cast<void*>(function), jump, sizeof(code));
  mprotect(pages, end - start, PROT_READ | PROT_EXEC);
  __builtin___clear_cache(reinterpret_cast<char*>(function), reinterpret_cast<char*>(end));
}

void become(const std::string& name) {
  auto autograd = c10::DispatchKey::AutogradPrivateUse1;
  if (name == "mps") {
    our_type = DeviceType::MPS, our_key = c10::DispatchKey::MPS, autograd = c10::DispatchKey::AutogradMPS;
    exchange_hooks(at::detail::getMPSHooks(), new MPSHooks);
  } else if (name == "cuda") {
    our_type = DeviceType::CUDA, our_key = c10::DispatchKey::CUDA, autograd = c10::DispatchKey::AutogradCUDA;
    exchange_hooks(at::detail::getCUDAHooks(), new CUDAHooks);
  } else {
    at::RegisterPrivateUse1HooksInterface(new OtherHooks);
  }
  our_device = Device(our_type, 0);
  c10::SetAllocator(our_type, &memory);
  c10::impl::DeviceGuardImplRegistrar(our_type, new Guard);
  overwrite(&at::accelerator::getAccelerator, &accelerator);

  auto library = [](const char* space, c10::DispatchKey key) {
    return new torch::Library(torch::Library::IMPL, space, key, __FILE__, __LINE__);  // registered as long as it lives
  };
  library("_", our_key)->fallback(torch::CppFunction::makeFromBoxedFunction<&compute>());
  auto& kernels = *library("aten", our_key);
  // torch's own kernel knows the devices that may take part in a copy, and this is none.
  kernels.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&compute>());
  if (our_type == DeviceType::CUDA) {
    kernels.impl("_softmax", widened<&at::_softmax_out>);
    kernels.impl("_log_softmax", widened<&at::_log_softmax_out>);
    kernels.impl("_softmax_backward_data", widened_backward<&at::_softmax_backward_data_out>);
    kernels.impl("_log_softmax_backward_data", widened_backward<&at::_log_softmax_backward_data_out>);
  }
  for (auto* some : {&kernels, library("aten", autograd)}) {
    some->impl("scaled_dot_product_attention", attention);
    if (our_type == DeviceType::PrivateUse1) some->impl("_has_compatible_shallow_copy_type", stays_itself);
  }
}

}  // namespace

TORCH_LIBRARY(emulated_device, m) {
  m.def("become(str name) -> ()", [](std::string name) { become(name); });
  m.def("refuse(str[] names, str words) -> ()", [](c10::List<std::string> names, std::string words) {
    without_kernel.clear();
    for (const std::string& name : names) without_kernel.insert(name);
    words_without_kernel = std::move(words);
  });
  m.def("refuse_float64(str words) -> ()", [](std::string words) {
    has_float64 = false;
    words_of_float64 = std::move(words);
  });
  m.def("refuse_faults(str words) -> ()", [](std::string words) {
    has_faults = true;
    words_of_faults = std::move(words);
  });
  m.def("replace_parameters() -> ()", []() { parameters_stay = false; });
  m.def("limit_memory(int bytes) -> ()", [](int64_t bytes) { held().limit = bytes; });
  m.def("default_generator() -> Generator?", []() { return default_generator(); });
  m.def("generator_state() -> Tensor", []() { return default_generator().get_state(); });
  m.def("set_generator_state(Tensor state) -> ()", [](const at::Tensor& state) {
    auto generator = default_generator();
    generator.set_state(state);
  });
  m.def("seed(int seed) -> ()", [](int64_t seed) {
    auto generator = default_generator();
    generator.set_current_seed(static_cast<uint64_t>(seed));
  });
}
