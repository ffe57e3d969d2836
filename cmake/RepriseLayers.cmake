# One static library a layer; each sees only those to its left.
set(REPRISE_LAYERS core kernels autograd nn distributed train)

# Sources of a layer, without the program's main and the side of the cuda device not chosen.
function(reprise_sources layer result)
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/${layer}/*.cc)
  list(FILTER sources EXCLUDE REGEX "/train/main\\.cc$")
  if(NOT REPRISE_HAS_MPI)
    list(FILTER sources EXCLUDE REGEX "/comm_mpi\\.cc$")
  endif()
  if(REPRISE_CUDA)
    list(FILTER sources EXCLUDE REGEX "/cuda_device_absent\\.cc$")
    file(GLOB_RECURSE cuda CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/${layer}/*.cu)
    list(APPEND sources ${cuda})
  else()
    list(FILTER sources EXCLUDE REGEX "/cuda_device\\.cc$")
  endif()
  set(${result} ${sources} PARENT_SCOPE)
endfunction()

set(left "")
foreach(layer ${REPRISE_LAYERS})
  reprise_sources(${layer} sources)
  if(NOT sources)
    file(CONFIGURE OUTPUT ${PROJECT_BINARY_DIR}/empty.cc CONTENT "")
    set(sources ${PROJECT_BINARY_DIR}/empty.cc)
  endif()
  add_library(reprise_${layer} STATIC ${sources})
  add_library(Reprise::${layer} ALIAS reprise_${layer})
  # Installed, both <reprise/core/tensor.h> and "core/tensor.h" are found; so they are here.
  target_include_directories(reprise_${layer} PUBLIC
    $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}>
    $<INSTALL_INTERFACE:include> $<INSTALL_INTERFACE:include/reprise>)
  target_link_libraries(reprise_${layer} PUBLIC ${left} PRIVATE $<BUILD_INTERFACE:reprise_flags>)
  set(left reprise_${layer})
endforeach()

# Installed only: CMake 3.25 would ask nvcc for a dialect of which it knows no flag.
target_compile_features(reprise_core INTERFACE $<INSTALL_INTERFACE:cxx_std_20>)

# Everything, for users: Reprise::reprise.
add_library(reprise_all INTERFACE)
target_compile_features(reprise_all INTERFACE cxx_std_20)
add_library(Reprise::reprise ALIAS reprise_all)
target_link_libraries(reprise_all INTERFACE reprise_train)
set(prefixed ${PROJECT_BINARY_DIR}/include/reprise)
file(MAKE_DIRECTORY ${prefixed})
foreach(layer ${REPRISE_LAYERS})
  file(CREATE_LINK ${PROJECT_SOURCE_DIR}/${layer} ${prefixed}/${layer} SYMBOLIC)
endforeach()
target_include_directories(reprise_all INTERFACE $<BUILD_INTERFACE:${PROJECT_BINARY_DIR}/include>)

target_link_libraries(reprise_core PUBLIC fmt::fmt OpenMP::OpenMP_CXX Threads::Threads)
target_link_libraries(reprise_kernels PRIVATE reprise_vendor::hwy Eigen3::Eigen)
if(REPRISE_HAS_ONEDNN)
  target_link_libraries(reprise_kernels PRIVATE reprise_vendor::dnnl)
  target_compile_definitions(reprise_kernels PRIVATE REPRISE_HAS_ONEDNN=1)
endif()
target_link_libraries(reprise_nn PUBLIC absl::status absl::statusor nlohmann_json::nlohmann_json)
target_compile_definitions(reprise_distributed PRIVATE REPRISE_VERSION="${PROJECT_VERSION}")
if(REPRISE_HAS_MPI)
  target_link_libraries(reprise_distributed PRIVATE MPI::MPI_CXX)
  target_compile_definitions(reprise_distributed PRIVATE
    REPRISE_HAS_MPI=1 OMPI_SKIP_MPICXX MPICH_SKIP_MPICXX)
endif()
if(REPRISE_HAS_NCCL)
  target_link_libraries(reprise_distributed PRIVATE reprise_vendor::nccl CUDA::cudart_static)
  set_source_files_properties(${PROJECT_SOURCE_DIR}/distributed/nccl_library.cc
    PROPERTIES COMPILE_DEFINITIONS REPRISE_HAS_NCCL=1)
endif()
target_link_libraries(reprise_train PUBLIC CLI11::CLI11 PRIVATE reprise_vendor::xxhash reprise_vendor::utf8)

# A family calls its CUDA side where it has one.
file(GLOB REPRISE_CUDA_FAMILIES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/kernels/*.cu)
list(TRANSFORM REPRISE_CUDA_FAMILIES REPLACE "\\.cu$" ".cc" OUTPUT_VARIABLE REPRISE_CUDA_CALLERS)
if(REPRISE_CUDA)
  # Private: no layer above kernels sees a CUDA header.
  foreach(layer core kernels)
    target_link_libraries(reprise_${layer} PRIVATE CUDA::cudart_static)
  endforeach()
  target_link_libraries(reprise_kernels PRIVATE CUDA::cublasLt)
  # Calls of a library, no kernel: the host's compiler takes all of it.
  set_source_files_properties(
    ${PROJECT_SOURCE_DIR}/kernels/matmul.cu ${PROJECT_SOURCE_DIR}/kernels/attention_cudnn.cu
    PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-x;c++")
  if(REPRISE_HAS_CUDNN)
    target_link_libraries(reprise_kernels PRIVATE ${CMAKE_DL_LIBS})
    # Folders of a build in every command would keep fresh clones from what is in ccache.
    set_property(SOURCE ${PROJECT_SOURCE_DIR}/kernels/attention_cudnn.cu APPEND PROPERTY COMPILE_DEFINITIONS
      REPRISE_HAS_CUDNN=1 NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING=1 REPRISE_CUDNN_FOLDERS="${REPRISE_CUDNN_FOLDERS}")
    foreach(folder ${REPRISE_CUDNN_INCLUDES})
      set_property(SOURCE ${PROJECT_SOURCE_DIR}/kernels/attention_cudnn.cu APPEND PROPERTY COMPILE_OPTIONS -isystem${folder})
    endforeach()
  endif()
  foreach(layer core kernels)
    target_compile_options(reprise_${layer} PRIVATE
      "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra;-Xptxas=-v>")
  endforeach()
  set_source_files_properties(${REPRISE_CUDA_CALLERS} PROPERTIES COMPILE_DEFINITIONS REPRISE_HAS_CUDA=1)
endif()

if(REPRISE_HAS_MPI)
  # The mpirun that belongs to the MPI that is linked.
  target_compile_definitions(reprise_train PRIVATE REPRISE_MPIRUN="${MPIEXEC_EXECUTABLE}")
endif()

add_executable(reprise train/main.cc)
target_link_libraries(reprise PRIVATE reprise_train reprise_flags)
set_target_properties(reprise PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR})
