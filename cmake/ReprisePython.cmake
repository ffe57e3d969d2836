# Where the packages of PyPI put NVIDIA's libraries, which PyTorch brings along: for machines whose
# toolkit lacks them. Sets REPRISE_PYTHON_NVIDIA, the folders that have include/ and lib/.
find_program(REPRISE_PYTHON NAMES python3 DOC "The Python whose packages are looked through")
mark_as_advanced(REPRISE_PYTHON)
set(REPRISE_PYTHON_NVIDIA "")
if(REPRISE_PYTHON)
  execute_process(
    COMMAND ${REPRISE_PYTHON} -c "import nvidia, os; print(';'.join(sorted(os.path.join(p, d) for p in nvidia.__path__ for d in os.listdir(p) if os.path.isdir(os.path.join(p, d, 'lib')))))"
    OUTPUT_VARIABLE REPRISE_PYTHON_NVIDIA OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()

# CUDA::<library> from there, of the toolkit's major version. These packages have no lib<library>.so
# without a number.
function(reprise_find_in_python library)
  find_library(REPRISE_PYTHON_${library} NAMES lib${library}.so.${CUDAToolkit_VERSION_MAJOR}
    HINTS ${REPRISE_PYTHON_NVIDIA} PATH_SUFFIXES lib NO_DEFAULT_PATH)
  find_path(REPRISE_PYTHON_${library}_INCLUDE ${library}.h
    HINTS ${REPRISE_PYTHON_NVIDIA} ${CUDAToolkit_INCLUDE_DIRS} PATH_SUFFIXES include NO_DEFAULT_PATH)
  mark_as_advanced(REPRISE_PYTHON_${library} REPRISE_PYTHON_${library}_INCLUDE)
  if(NOT REPRISE_PYTHON_${library} OR NOT REPRISE_PYTHON_${library}_INCLUDE)
    message(FATAL_ERROR "Reprise: ${library} ${CUDAToolkit_VERSION_MAJOR} is neither in the CUDA toolkit nor among "
      "the packages of ${REPRISE_PYTHON} (PyPI: nvidia-cublas); -DREPRISE_PYTHON names another Python")
  endif()
  add_library(CUDA::${library} SHARED IMPORTED GLOBAL)
  set_target_properties(CUDA::${library} PROPERTIES
    IMPORTED_LOCATION ${REPRISE_PYTHON_${library}}
    INTERFACE_INCLUDE_DIRECTORIES ${REPRISE_PYTHON_${library}_INCLUDE})
endfunction()
