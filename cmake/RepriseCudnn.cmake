# cuDNN's headers, where its library lies, and cudnn_frontend (headers only), which builds its
# graphs. Sets REPRISE_HAS_CUDNN, REPRISE_CUDNN_INCLUDES and REPRISE_CUDNN_FOLDERS, for the one file that calls it.
# The library itself is loaded at run time.
#
# cudnn_frontend is taken from REPRISE_CUDNN_FRONTEND (a folder with cudnn_frontend.h), an installed
# one, or the wheel of PyPI, downloaded into the build folder with pip.
set(REPRISE_CUDNN_FRONTEND "" CACHE PATH "Folder of cudnn_frontend.h")
set(REPRISE_CUDNN_FRONTEND_VERSION 1.32.0)
set(REPRISE_CUDNN_FRONTEND_HASH c6006556017a4d1c914c52a556c71b1267f2d6a0500f742e7b4edef539878df0)
set(REPRISE_HAS_CUDNN OFF)

# Where PyTorch's packages put things.
set(site_packages "")
if(REPRISE_PYTHON)
  execute_process(
    COMMAND ${REPRISE_PYTHON} -c "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    OUTPUT_VARIABLE site_packages OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()

# The wheel is the same headers whatever Python asks: one is named, so that its hash is known.
function(reprise_download_cudnn_frontend result)
  set(folder ${PROJECT_BINARY_DIR}/cudnn_frontend)
  set(${result} ${folder}/include PARENT_SCOPE)
  if(EXISTS ${folder}/include/cudnn_frontend.h OR NOT REPRISE_PYTHON)
    return()
  endif()
  file(WRITE ${folder}/requirements.txt
    "nvidia-cudnn-frontend==${REPRISE_CUDNN_FRONTEND_VERSION} --hash=sha256:${REPRISE_CUDNN_FRONTEND_HASH}\n")
  execute_process(
    COMMAND ${REPRISE_PYTHON} -m pip download --quiet --disable-pip-version-check --no-deps
      --only-binary=:all: --python-version 3.11 --implementation cp --abi cp311
      --platform manylinux_2_28_x86_64 --require-hashes -r ${folder}/requirements.txt -d ${folder}
    RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output TIMEOUT 300)
  file(GLOB wheels ${folder}/*.whl)
  if(failed OR NOT wheels)
    file(WRITE ${folder}/pip.log "${output}")
    return()
  endif()
  file(ARCHIVE_EXTRACT INPUT ${wheels} DESTINATION ${folder} PATTERNS include/*)
endfunction()

find_path(REPRISE_CUDNN_INCLUDE cudnn.h
  HINTS ${CUDAToolkit_INCLUDE_DIRS} ${site_packages}/nvidia/cudnn ${REPRISE_PYTHON_NVIDIA} PATH_SUFFIXES include)
find_path(REPRISE_CUDNN_FRONTEND_INCLUDE cudnn_frontend.h
  HINTS ${REPRISE_CUDNN_FRONTEND} ${site_packages}/include)
mark_as_advanced(REPRISE_CUDNN_INCLUDE REPRISE_CUDNN_FRONTEND_INCLUDE)
set(frontend ${REPRISE_CUDNN_FRONTEND_INCLUDE})
if(REPRISE_CUDNN_INCLUDE AND NOT frontend)
  reprise_download_cudnn_frontend(frontend)
endif()

if(NOT REPRISE_CUDNN_INCLUDE)
  message(STATUS "Reprise: no cuDNN, cudnn.h was not found: attention runs on our own tiled kernels alone "
    "(Debian: cudnn9-cuda-13; PyPI: nvidia-cudnn-cu13)")
elseif(NOT EXISTS ${frontend}/cudnn_frontend.h)
  message(STATUS "Reprise: no cuDNN, cudnn_frontend ${REPRISE_CUDNN_FRONTEND_VERSION} was neither found nor "
    "downloaded: attention runs on our own tiled kernels alone (set REPRISE_CUDNN_FRONTEND to its folder)")
else()
  set(REPRISE_HAS_CUDNN ON)
  # Folders in which the libraries were seen, after those of the loader.
  find_file(REPRISE_CUDNN_FILE NAMES libcudnn.so.9
    HINTS ${CUDAToolkit_LIBRARY_DIR} ${site_packages}/nvidia/cudnn ${REPRISE_PYTHON_NVIDIA} ${REPRISE_CUDNN_INCLUDE}/..
    PATH_SUFFIXES lib)
  mark_as_advanced(REPRISE_CUDNN_FILE)
  set(folders ${CUDAToolkit_LIBRARY_DIR})
  if(REPRISE_CUDNN_FILE)
    cmake_path(GET REPRISE_CUDNN_FILE PARENT_PATH folder)
    list(PREPEND folders ${folder})
  endif()
  list(REMOVE_DUPLICATES folders)
  list(JOIN folders ":" REPRISE_CUDNN_FOLDERS)
  set(REPRISE_CUDNN_INCLUDES ${frontend} ${REPRISE_CUDNN_INCLUDE})
endif()
