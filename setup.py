"Package metadata lives in settings.ini; pyproject.toml holds the build backend and the settings of the tools"
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

statuses = {1:'Planning', 2:'Pre-Alpha', 3:'Alpha', 4:'Beta', 5:'Production/Stable'}
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
cfg = ini['DEFAULT']
lib = cfg['lib_path']

# chkstyle: ignore-node
setup(
    name=cfg['lib_name'],
    description=cfg['description'],
    author=cfg['author'],
    license_expression=cfg['license'],
    keywords=cfg['keywords'].split(),
    python_requires=f'>={cfg["min_python"]}',
    project_urls={'Repository':cfg['git_url'], 'Documentation':cfg['doc_url']},
    classifiers=[
        f'Development Status :: {cfg["status"]} - {statuses[cfg.getint("status")]}',
        f'Intended Audience :: {cfg["audience"]}',
        f'Natural Language :: {cfg["language"]}',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3 :: Only'],
    packages=find_packages(include=[lib, f'{lib}.*']),
    package_data={f'{lib}.recipes':['*.yml','yaml/*.yml']},
    install_requires=cfg['requirements'].split(),
    extras_require={o:cfg[f'{o}_requirements'].split() for o in ('dev','cuhk03','timm','dist','log','tune','export','caffe')},
    entry_points={'console_scripts':cfg['console_scripts'].split(), 'nbdev':[f'{lib} = {lib}._docidx:d']})
