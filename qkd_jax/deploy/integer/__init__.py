"""The integer program of a net: conversion, evaluation, and its file."""
